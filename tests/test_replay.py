"Frames are what the search was, in whatever way it got to its end; and they are drawn as what they are."
import json
import math
import re

import pytest
import torch

from mgdarts.runs import frames
from mgdarts.views import replay
from mgdarts.runs.listen import read_events
from mgdarts.runs import run as runs
from mgdarts.cli.main import main
from mgdarts.views.report import advantage, report
from mgdarts.base.options import InputError
from mgdarts.methods.registry import preset
from mgdarts.runs.frames import BINS, REPLAY_FILE, Frame, from_line, kinds, to_line
from mgdarts.space.darts import EDGES, INPUTS, NODE_EDGES, OPS, STATES, NetSpec, is_conv
from mgdarts.space.space import GRANULARITIES

KINDS = kinds(NetSpec)

FAST = {"data.subset": 200, "search.warmup": 1, "search.max_epochs": 2, "search.batch": 50, "search.prune_every": 1}



@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    "A run, and for each of its moments what a slow look at the net itself finds."
    out, seen = tmp_path_factory.mktemp("replay") / "run", []

    def prepare(search):
        search.events.listen(lambda e: seen.append(slowly(search, e)), *frames.MOMENTS)

    runs.search(preset("smoke", **FAST), out, listeners=(report,), prepare=prepare)
    return out, seen


@torch.no_grad()
def slowly(search, event):
    "Operations, thresholds, units and histograms by loops over everything there is."
    net, on = search.net, search.net.discretising
    found = {"event": event.type, "ops": {}, "beta": {}, "omega": {}, "widths": []}

    def place(edges, v):
        return max(0, min(len(edges) - 2, sum(v >= e for e in edges.tolist()) - 1))

    for c, cell in enumerate(net.cells):
        strength = torch.sigmoid(net.alpha[c])
        found["widths"].append([sum(cell.layout.alive[u:u + cell.spec.width].tolist()) for u in map(cell.spec.state_unit, range(STATES))])
        for n in range(INPUTS, STATES):
            live = [(e, o) for e in NODE_EDGES[n] for o in range(len(OPS)) if net.op_live[c, e, o]]
            best = max(live, key=lambda p: float(strength[p]))
            for e, o in live:
                kept = not on or (e, o) == best or bool(strength[e, o] > net.t_alpha[c, e, o])
                found["ops"][c, e, o] = (float(strength[e, o]), kept, float(net.t_alpha[c, e, o]) if on else math.nan)
        at = 0
        for gate, ids in cell.layout.gates:
            g = torch.sigmoid(cell.beta[at:at + len(ids)])
            at += len(ids)
            if not gate.learned:
                continue
            t = net.t_pre[c, -1 - gate.edge] if gate.op < 0 else net.t_beta[c, gate.edge, gate.op]
            best, t = int(g.argmax()), float(t)
            for i, v in enumerate(g.tolist()):
                kept = not on or i == best or v > t
                key = c, "input" if gate.op < 0 else OPS[gate.op], kept, place(BINS["filter"], v)
                found["beta"][key] = found["beta"].get(key, 0) + 1
        at = 0
        for seg, shape in cell.layout.kernels:
            if seg.group != "omega":
                continue
            n = math.prod(shape)
            w, alive = cell.omega[at:at + n].abs(), cell.omega_live[at:at + n]
            at += n
            t, edges = net.t_omega[c, seg.edge, seg.op], BINS["weight"]
            bins = ((w[:, None] >= edges).sum(1) - 1).clamp(0, len(edges) - 2).tolist()
            for above, b, a in zip((w > t).tolist(), bins, alive.tolist()):
                if a:
                    key = c, OPS[seg.op], not on or above, b
                    found["omega"][key] = found["omega"].get(key, 0) + 1
    return found


def counted(h):
    return {(c, KINDS[k], bool(on), b): int(h[c, k, on, b]) for c, k, on, b in h.nonzero().tolist()}


def test_frames_are_what_a_slow_look_finds(recorded):
    run, seen = recorded
    got = replay.replay(run)
    assert not got.missing and [f.type for f in got] == [s["event"] for s in seen] and {"epoch", "commit", "regrow"} <= {f.type for f in got}
    for f, want in zip(got, seen):
        assert f.places() == list(want["ops"]) or sorted(f.places()) == sorted(want["ops"])
        for place, a, on, t in zip(f.places(), f.alpha.tolist(), f.on.tolist(), f.t_alpha.tolist()):
            strength, kept, threshold = want["ops"][place]
            assert a == pytest.approx(strength, rel=1e-3) and on == kept and t == pytest.approx(threshold, rel=1e-3, nan_ok=True)
        assert counted(f.beta) == want["beta"] and counted(f.omega) == want["omega"] and f.widths.tolist() == want["widths"]
        assert f.data["type"] == f.type and f.data["epoch"] == f.epoch


def test_sizes_of_frames_are_those_of_the_events(recorded):
    for f in replay.replay(recorded[0]):
        if f.type == "epoch":
            total = f.now[f.on].sum(0).tolist()
            assert f.data["ops"] == int(f.on.sum()) and f.data["retention"]["filter"] == pytest.approx(total[0] / total[1]) and f.data["retention"]["weight"] == pytest.approx(total[2] / total[3])
        else:
            assert f.data["ops"] == len(f.at)


def test_a_resumed_search_has_the_same_frames(recorded, tmp_path):
    def stop(event):
        if event.type == "commit" and event.epoch == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.search(preset("smoke", **FAST), tmp_path / "cut", listeners=(stop,), save_every=0)
    with open(tmp_path / "cut" / REPLAY_FILE, "ab") as f:
        f.write(b'{"event": 3, "type": "epo')  # cut off by a kill
    runs.search(None, tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / REPLAY_FILE).read_bytes() == (recorded[0] / REPLAY_FILE).read_bytes()


def test_one_frame_a_moment_and_none_twice(recorded):
    events = read_events(recorded[0] / "events.jsonl")
    numbers = [json.loads(line)["event"] for line in (recorded[0] / REPLAY_FILE).read_bytes().splitlines()]
    assert numbers == [i for i, e in enumerate(events, 1) if e["type"] in frames.MOMENTS]
    assert (recorded[0] / REPLAY_FILE).stat().st_size < 5000 * len(numbers)


def test_what_grew_back_is_marked_and_stays_so(recorded):
    got = replay.replay(recorded[0])
    back = set()
    for f in got:
        here = set(f.places())
        if f.type == "regrow":
            back |= {(c, EDGES.index((i, j)), OPS.index(o)) for c, i, j, o in f.data["regrown"]}
        back &= here
        assert {p for p, r in zip(f.places(), f.regrown.tolist()) if r} == back
    assert any(f.type == "regrow" and f.regrown.any() for f in got)


def test_an_old_run_is_replayed_as_far_as_its_events_go(recorded, tmp_path):
    run, _ = recorded
    for name in ("config.json", "events.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    old, new = replay.replay(tmp_path), replay.replay(run)
    assert "kept no frames" in old.missing and old.labels == new.labels
    for i in (0, len(old) // 2, -1):
        a, b = replay.frame_figure(old, i), replay.frame_figure(new, i)
        assert a.layout.title.text == b.layout.title.text and a.data[0].x == b.data[0].x
    with pytest.raises(InputError, match="were not recorded"):
        replay.cell_figure(old[-1], 0)
    page = replay.animation(old, tmp_path / "replay.html", "cdn").read_text("utf-8")
    assert "Not in this record: cells and thresholds" in page


def test_damaged_frames_are_passed_over_and_counted(recorded, tmp_path):
    run, _ = recorded
    for name in ("config.json", "events.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    lines = (run / REPLAY_FILE).read_bytes().splitlines(keepends=True)
    bad = [b"[]\n", b'{"type": "epoch"}\n', lines[2].replace(b'"block": "', b'"block": "AAAA'), b"\xff\xfe\n", lines[4][:200] + b"\n"]
    (tmp_path / REPLAY_FILE).write_bytes(b"".join(bad + lines[5:]))
    got = replay.replay(tmp_path)
    assert got.missing.startswith(f"cells and thresholds of 5 of {len(lines)} moments") and [f.cells > 0 for f in got] == [False] * 5 + [True] * (len(lines) - 5)


def test_a_line_keeps_a_frame(recorded):
    f = replay.replay(recorded[0])[3]
    g = from_line(to_line(f))
    for k in Frame.TENSORS:
        a, b = getattr(f, k), getattr(g, k)
        assert a.shape == b.shape and (torch.allclose(a, b, rtol=1e-3, equal_nan=True) if a.is_floating_point() else a.equal(b))


def test_a_figure_shows_its_frame(recorded):
    got = replay.replay(recorded[0])
    for i in (0, 3, len(got) - 1):
        f, fig = got[i], replay.frame_figure(got, i)
        cells = [t for t in fig.data if t.hovertemplate and "customdata" in t.hovertemplate and t.type == "scatter"]
        assert len(cells) == got.cells
        shown = [(c, e, o) for c, t in enumerate(cells) if c < f.cells for (o, e), s in zip(zip(t.x, t.y), t.marker.size) if s > 2.5]
        assert sorted(shown) == sorted(f.places())
        pale = sum(o == .35 for t in cells for o in t.marker.opacity)
        assert pale == int((~f.on).sum())
        bars = [t for t in fig.data if t.type == "bar"]
        assert [sum(t.customdata) for t in bars] == [int((~f.on).sum()), int(f.on.sum()), *(int(h[:, :, s].sum()) for h in (f.beta, f.omega) for s in (0, 1))]
    assert len(replay.cell_of(got[-1], 1)[0].ops) == sum(c == 1 for c, _, _ in got[-1].places())


def test_selections_of_a_histogram_add_up(recorded):
    f = replay.replay(recorded[0])[-1]
    whole = replay.histograms(f)
    for g, kinds in zip(GRANULARITIES, (OPS, KINDS, KINDS[:-1])):
        for part in ([replay.histograms(f, cell=c) for c in range(f.cells)], [replay.histograms(f, kind=k) for k in kinds]):
            assert sum(p[g][1] for p in part).equal(whole[g][1]) and sum(p[g][2] for p in part).equal(whole[g][2])
            assert sum(len(p[g][3]) for p in part) == len(whole[g][3])
    conv = sum(is_conv(o) for _, _, o in f.places())
    assert [len(whole[g][3]) for g in GRANULARITIES] == [len(f.at), conv + 2 * f.cells, conv]


def test_an_animation_has_every_moment_and_needs_no_network(recorded, tmp_path):
    got = replay.replay(recorded[0])
    fig = replay.animated(got)
    assert [f.name for f in fig.frames] == [str(i) for i in range(len(got))] == [s.args[0][0] for s in fig.layout.sliders[0].steps]
    for i in (1, len(got) - 1):
        still = replay.frame_figure(got, i)
        for at, new in zip(fig.frames[i].traces, fig.frames[i].data):
            for k in ("x", "y", "customdata", "text"):
                if new[k] is not None and k in new.to_plotly_json():
                    assert list(new[k]) == list(still.data[at][k] or ())
    page = replay.animation(got, tmp_path / "a.html")
    text = page.read_text("utf-8")
    assert page.stat().st_size < 6e6 and not re.search(r"<(script|link|img)[^>]+(src|href)=", text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html"]


@pytest.mark.parametrize("most", [1, 2, 7, 50])
def test_thinning_keeps_the_end(recorded, most):
    got = replay.replay(recorded[0]).frames
    kept = replay.thin(got, most)
    assert len(kept) == min(most, len(got)) and kept == sorted(set(kept)) and (most == 1 or kept[-1] == len(got) - 1)


def test_command(recorded, tmp_path, capsys):
    assert main(["replay", str(recorded[0]), "--out", str(tmp_path / "r.html"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["moments"] == len(replay.replay(recorded[0])) and facts["bytes"] == (tmp_path / "r.html").stat().st_size and facts["missing"] == ""
    for args in ([str(tmp_path)], [str(recorded[0]), "--out", str(tmp_path / "r.png")], [str(recorded[0]), "--out", str(tmp_path / "no/r.html")]):
        assert main(["replay", *args]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_run_without_epochs(recorded, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((recorded[0] / "config.json").read_bytes())
    got = replay.replay(tmp_path)
    assert len(got) == 0 and replay.frame_figure(got).layout.annotations and not replay.animated(got).frames
    assert main(["replay", str(tmp_path)]) == 2
    with pytest.raises(InputError, match="none is done yet"):
        got.at(1)


def test_the_report_links_to_the_replay_and_tells_the_advantage(recorded, capsys):
    run, _ = recorded
    assert "replay.html" not in (run / "report.html").read_text("utf-8")
    assert main(["replay", str(run)]) == 0
    assert 'href="replay.html"' in (run / "report.html").read_text("utf-8") and '<script src="plotly.min.js">' in (run / "replay.html").read_text("utf-8")
    assert advantage({"test_acc_final": 60.0}, {"test_acc_final": 50.0}, 100) == "+10.00 points (standard error 7.00)"
