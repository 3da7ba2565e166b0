"`python -m mgdarts`: the command line."
from mgdarts.cli.main import main

if __name__ == "__main__":
    main()
