"""The tables of benchmarks/README.md are those of the figures that are kept, and say where a peer is ahead."""

import importlib
import json
import re
import sys

import pytest

from benchmarks import compare, harness, tables, workloads
from benchmarks.compare import Suite
from benchmarks.peers import PEERS, install
from benchmarks.runs import RUNS, TABLES, does, peer_module, run
from benchmarks.tables import SECTIONS, ahead, comparison, kept, medians

README = (harness.HERE / "README.md").read_text(encoding="utf-8")
MACHINE = {
    "processor": "a processor",
    "cores": 2,
    "memory_nbytes": 16e9,
    "python": "3.12.3",
    "torch": "2.13.0",
    "numpy": "2.4.6",
}
SCENARIOS = {scenario.title: scenario for scenarios in TABLES.values() for scenario in scenarios}
DICTS = SCENARIOS["dicts, 32 x 32 x 3, batch 256: samples/s"]
TURN = SCENARIOS["from one epoch to the next: ms"]


def content(figures, **more):
    """A result in which these runs had these figures."""
    return {
        "machine": MACHINE,
        "short": False,
        "rounds": 3,
        "seconds": 1,
        "photographs": "photographs",
        "versions": {"ours": [], "grain_loader": ["grain==0.2.18"]},
        "not_measured": {"ffcv_loader": "it has no wheels", "tf_data, small": "out of patience"},
        "figures": figures,
        **more,
    }


def rates(*values):
    return [{"samples_per_s": value, "turn_s": 10 / value if value else None} for value in values]


# -- what is committed


@pytest.mark.parametrize("name", SECTIONS)
def test_the_readme_has_what_the_kept_figures_make(name):
    found, (_, section) = kept(name), SECTIONS[name]
    between = re.search(rf"<!-- {name}:start -->\n(.*?)\n?<!-- {name}:end -->", README, re.DOTALL)
    if found is None:
        assert between is None or not between[1].strip(), "a table without figures"
    else:
        assert between is not None
        assert between[1] == section(found)


def test_results_name_no_host_and_no_path():
    for file in harness.RESULTS.glob("*.json"):
        assert "/tmp/" not in file.read_text()
        assert "/home/" not in file.read_text()


# -- what a table says


def test_medians_quartiles_and_the_best_are_shown():
    text = comparison(content({"dicts": {"ours": rates(100, 300, 200), "grain_loader": rates(90, 80, 70)}}))
    assert "| loaders | **200** (150 to 250) |" in text
    assert "| Grain | 80 (75 to 85) |" in text
    assert "No peer is better than ours" in text
    assert "Measured on: a processor, 2 cores, 16 GB; Python 3.12.3" in text


def test_where_a_peer_is_better_the_table_says_so_by_ratios_within_rounds():
    # By medians ours would be ahead; in two rounds of three it is not.
    figures = {"dicts": {"ours": rates(100, 110, 900), "grain_loader": rates(200, 220, 105)}}
    assert ahead(content(figures), DICTS) == {"grain_loader": 2}
    assert "Better than ours: dicts, 32 x 32 x 3, batch 256: Grain 2.00 times." in comparison(content(figures))


def test_less_is_better_where_it_is_waiting():
    figures = {"short epochs": {"ours": rates(200), "grain_loader": rates(100)}}
    assert medians(content(figures), TURN) == {"ours": 50, "grain_loader": 100}
    assert ahead(content(figures), TURN) == {}
    assert "| loaders | **50** |" in comparison(content(figures))
    swapped = {"short epochs": {"ours": rates(100), "grain_loader": rates(200)}}
    assert ahead(content(swapped), TURN) == {"grain_loader": 2}


def test_what_was_not_measured_is_not_printed_but_named():
    text = comparison(content({"dicts": {"ours": rates(100), "tf_data": [None]}}))
    assert "| tf.data |" not in text
    assert "- not measured: FFCV: it has no wheels" in text
    assert "- not measured: tf.data, small: out of patience" in text


def test_a_trial_is_marked_and_never_tabled(monkeypatch, tmp_path):
    trial = content({"dicts": {"ours": rates(100)}}, short=True)
    assert "A trial" in comparison(trial)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    (tmp_path / "peers.json").write_text(json.dumps(trial))
    assert kept("peers") is None


def test_the_plot_has_a_panel_for_each_figure(tmp_path):
    import cv2

    figures = {"dicts": {"ours": rates(100), "grain_loader": rates(80)}, "short epochs": {"ours": rates(100)}}
    tables.draw(content(figures), tmp_path / "peers.png")
    assert cv2.imread(str(tmp_path / "peers.png")).shape == (256, 1040, 3)


# -- peers


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_pins_what_it_needs_and_does_something_or_says_why_not(peer):
    module = peer_module(peer)
    if hasattr(module, "WHY_NOT"):
        assert not any(does(peer, name) for name in RUNS)
    else:
        assert any(does(peer, name) for name in RUNS)
        assert all("==" in requirement for requirement in module.REQUIREMENTS)


def test_a_peers_module_can_be_imported_where_the_peer_is_not_installed():
    for peer in PEERS:
        importlib.import_module(f"benchmarks.peers.{peer}")
    assert not {"grain", "tensorflow", "spdl", "nvidia.dali", "litdata", "streaming", "ffcv"} & set(sys.modules)


def test_an_environment_counts_as_made_only_with_the_versions_of_now(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    assert install.python_of("grain_loader") is None
    (tmp_path / "grain_loader").mkdir()
    (tmp_path / "grain_loader" / "requirements").write_text("\n".join(peer_module("grain_loader").REQUIREMENTS))
    assert install.python_of("grain_loader") == str(tmp_path / "grain_loader" / "bin" / "python")
    monkeypatch.setattr(peer_module("grain_loader"), "REQUIREMENTS", ("grain==9.9.9",))
    assert install.python_of("grain_loader") is None
    assert install.python_of("ours") == sys.executable


def test_a_peer_that_cannot_be_compiled_says_what_to_install_by_hand(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(install, "_python", lambda peer: "false")
    monkeypatch.setattr(sys, "executable", "true")
    assert install.install("grain_loader") == "status 1"
    assert install.install("ffcv_loader").startswith("status 1 (this needs: apt install g++ ")


def test_an_unknown_peer_is_refused(capsys):
    assert install.main(["graain"]) == 2
    assert compare.main(["--peers", "graain"]) == 2
    assert "graain" in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["ours", "torch_loader"])
def test_photographs_are_cropped_and_normalised(peer, few_photos, monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    files = workloads.Photos(sorted(map(str, few_photos.glob("train/coffee/*.jpg")))[:4], "")
    for normalised, shape, dtype in ((False, (4, 224, 224, 3), "uint8"), (True, (4, 3, 224, 224), "float32")):
        (batch,) = peer_module(peer).photos(files, batch_size=4, workers=0, normalised=normalised)
        image = workloads.image_of(batch)
        assert (image.shape, str(image.dtype)) == (shape, dtype)


def test_a_run_gives_the_figures_that_tables_show():
    found = run("ours", "short epochs", 60, "", "")
    for scenario in SCENARIOS.values():
        assert scenario.figure in found
    assert found["turn_s"] > 0


# -- the suite


def test_a_run_that_failed_is_noted_and_not_tried_again(monkeypatch, tmp_path):
    tried = []

    def fails_for_torch(module, function, *, python, timeout_s, peer, name, **_):
        tried.append((peer, name))
        if peer == "torch_loader":
            raise RuntimeError("failed:\nImportError: no such thing")
        return rates(100)[0]

    monkeypatch.setattr(compare, "run_fresh", fails_for_torch)
    suite = Suite(tmp_path, ["ours", "torch_loader"], ["dicts", "tuples"], 0.1, lambda line: None)
    suite.round(0)
    suite.round(1)
    assert tried == [
        ("ours", "dicts"),
        ("torch_loader", "dicts"),
        ("ours", "tuples"),
        ("torch_loader", "tuples"),
        ("ours", "dicts"),
        ("ours", "tuples"),
    ]
    found = suite.content(2, short=False)
    assert found["not_measured"]["torch_loader, dicts"] == "ImportError: no such thing"
    assert len(found["figures"]["dicts"]["ours"]) == 2


def test_the_command_keeps_and_prints_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(compare, "run_fresh", lambda *_, peer, **__: rates(300 if peer == "ours" else 100)[0])
    assert compare.main(["--only", "dicts,tuples", "--rounds", "2", "--out", "trial", "--short"]) == 0
    told = capsys.readouterr().out
    assert "round 2: tuples, ours" in told
    assert "| loaders | **300** (300 to 300) | **300** (300 to 300) |" in told
    found = json.loads((tmp_path / "trial.json").read_text())
    assert (found["short"], found["rounds"], len(found["figures"]["dicts"]["ours"])) == (True, 2, 2)
    assert found["machine"]["cores"] > 0
    assert found["versions"]["ours"][0].startswith("torch==")


def test_rounds_alternate_in_order(monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(compare, "run_fresh", lambda *_, peer, **__: tried.append(peer) or rates(1)[0])
    suite = Suite(tmp_path, ["ours", "torch_loader"], ["dicts"], 0.1, lambda line: None)
    suite.round(0)
    suite.round(1)
    assert tried == ["ours", "torch_loader", "torch_loader", "ours"]
