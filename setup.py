"""Packaging shim: every value lives in settings.ini."""
import shlex
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key):
    return shlex.split(cfg.get(key, ""))


extras = {k.removesuffix("_requirements"): requirements(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for rs in extras.values() for r in rs})

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], author=cfg["author"],
    author_email=cfg["author_email"], keywords=cfg["keywords"], license="Apache-2.0", url=cfg["git_url"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]) + ["mgdarts.views.static"],  # no Python
    include_package_data=True,
    python_requires=f">={cfg['min_python']}", install_requires=requirements("requirements"), extras_require=extras,
    long_description=Path("README.md").read_text("utf-8"), long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research"],
    project_urls={"Source": cfg["git_url"]},
    entry_points={"console_scripts": requirements("console_scripts")},
)
