"""Every block of the README runs as it is written; every list, number and name in it is what there is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from fairseq import options
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf

from benchmarks import accuracy, fidelity, radii
from benchmarks.study_tables import overview, summary, tables, tuning
from benchmarks.tasks import TASKS
from deltasam_plugin import find_rho, report, sharpness
from deltasam_plugin.batch.descent import DESCENTS
from deltasam_plugin.batch.measures import MEASURES
from deltasam_plugin.fairseq.config import DeltaSAMCriterionConfig, DeltaSAMOptimizerConfig
from deltasam_plugin.fairseq.criterions.registry import LOGITS
from deltasam_plugin.fairseq.scalars import MEANINGS
from deltasam_plugin.loss import Statistics
from deltasam_plugin.settings import DEFAULT_RHO
from examples.common.classification import OPTIMIZERS, TITLES
from examples.sentiment import prepare
from examples.sentiment.recipe import SHARED
from tests.helpers.registries import BUILT_IN_LOSSES, BUILT_IN_WEIGHTINGS
from tests.helpers.runs import SENTENCES as ROBERTA_RUN
from tests.helpers.runs import SMOOTHED, fairseq_train, scalars
from tests.recipes.all_recipes import ALL, TRAINS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "examples" / "sentiment" / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("*/*/README.md"))]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {  # by name: the language of the block, and what it alone contains
    "install": ("bash", "pip install"),
    "targets": ("bash", "make example"),
    "two words": ("diff", "fairseq-train"),
    "generate": ("bash", "fairseq-generate"),
    "hydra": ("bash", "fairseq-hydra-train"),
    "example": ("python", "DeltaSAM("),
    "its output": ("text", "step 60"),
    "path": ("bash", "--output page.html"),
    "find_rho": ("bash", "find_rho -- fairseq-train DATA …\n"),
    "sharpness": ("bash", "deltasam_plugin.sharpness"),
    "report": ("bash", "writes report.html"),
    "criterion": ("python", "per_sample_losses"),
    "weighting": ("python", "deltasam_plugin.weighting("),
    "citation": ("bibtex", "zhou-etal-2022-sharpness"),
}

TOY: list[object] = ["--arch", "transformer_tiny", "--encoder-normalize-before", "--decoder-normalize-before"]

MY_CRITERION = """
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion, LabelSmoothedCrossEntropyCriterionConfig)

@register_criterion("my_criterion", dataclass=LabelSmoothedCrossEntropyCriterionConfig)
class MyCriterion(LabelSmoothedCrossEntropyCriterion):
    pass
"""


def block(name: str) -> str:
    """The text of a block, without its fences."""
    language, marker = BLOCKS[name]
    (found,) = (text for kind, text in FENCED.findall(README) if kind == language and marker in text)
    return found


def printed(marker: str) -> str:
    """What an instrument has printed for the sentiment example: the block that alone contains the marker."""
    (found,) = (text for kind, text in FENCED.findall(EXAMPLE) if kind == "text" and marker in text)
    return found


def words(command: str) -> list[str]:
    """A command as the shell splits it."""
    return shlex.split(command.replace("\\\n", " "))


def shell(command: str, folder: Path) -> str:
    """What a command prints, run in a folder by bash with this environment's programs and this repository's plugin."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def rows(text: str, head: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is `head`, by the names of the columns."""
    (table,) = re.findall(rf"^\| {head} +\|.*\n(?:\|.*\n)+", text, re.MULTILINE)
    names, _, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return [dict(zip(names, row, strict=True)) for row in cells]


def test_every_block_is_one_of_those_that_are_tested() -> None:
    for name in BLOCKS:
        assert block(name)
    assert len(FENCED.findall(README)) == len(BLOCKS)
    assert not re.search(r"^    ", FENCED.sub("", README), re.MULTILINE), "an indented block, which nothing tests"


def test_the_two_words(translation_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the diff; a checkpoint of either is continued by the other; then the last one generates."""
    monkeypatch.chdir(ROOT)  # --user-dir deltasam_plugin
    sides = {}
    for sign in "-+":
        lines = [line[1:] for line in block("two words").splitlines(keepends=True) if line[0] in (" ", sign)]
        program, data, more, *sides[sign] = words("".join(lines))
        assert (program, data, more) == ("fairseq-train", "DATA", "…")
    for updates, sign in ((2, "-"), (4, "+"), (6, "-")):
        saved = fairseq_train(translation_data, tmp_path, *TOY, *sides[sign], updates=updates)
        config = saved["cfg"]
        assert saved["optimizer_history"][-1]["num_updates"] == updates
        assert tuple(saved["last_optimizer_state"]["param_groups"][0]["betas"]) == (0.9, 0.98)
        assert config["criterion"]["label_smoothing"] == 0.1
        names = [config["optimizer"]["_name"], config["criterion"]["_name"]]
        assert names == (["delta_sam"] * 2 if sign == "+" else ["adam", SMOOTHED])
        logged = {name for _, name, *_ in saved["extra_state"]["metrics"]["train"]}
        assert any(name.endswith("sam_sharpness") for name in logged) or sign == "-"

    program, data, *given = words(block("generate"))
    assert (program, data) == ("fairseq-generate", "DATA")
    given[given.index("--path") + 1] = tmp_path / "checkpoint_best.pt"
    given += ["--cpu", "--num-workers", 0, "--batch-size", 8, "--beam", 2]
    assert shell(shlex.join(map(str, [program, translation_data, *given])), ROOT).count("\nH-") == 24

    variants = re.findall(r"`(--sam-\w+ [a-z]+)` for", README)
    assert variants == ["--sam-weighting uniform", "--sam-perturbation instance"]
    for index, variant in enumerate(variants):
        fairseq_train(translation_data, tmp_path / f"{index}", *TOY, *sides["+"], *words(variant), updates=1)


SENTENCES = {"_name": "sentence_prediction", "num_classes": 2, "init_token": 0, "separator_token": 2}
ROBERTA = {"_name": "roberta", "encoder_layers": 1, "encoder_embed_dim": 32, "encoder_attention_heads": 2}


@pytest.mark.parametrize("kind", ["translation", "criterion as a string", "sentences"])
def test_hydra(translation_data: Path, sentence_data: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The overrides make δ-SAM of a YAML of one's own."""
    config: dict[str, Any] = {
        "common": {"cpu": True, "seed": 1},
        "task": {"_name": "translation", "data": str(translation_data)},
        "criterion": {"_name": SMOOTHED, "label_smoothing": 0.2},
        "dataset": {"batch_size": 16, "num_workers": 0, "disable_validation": True},
        "optimization": {"lr": [0.01], "max_update": 2},
        "optimizer": {"_name": "adam", "adam_betas": "(0.9, 0.98)"},
        "lr_scheduler": {"_name": "fixed", "warmup_updates": 0},
        "model": {"_name": "transformer_tiny", "base_layers": 0},
        "checkpoint": {"save_dir": str(tmp_path / "saved")},
    }
    command = block("hydra").strip().replace("DIR", str(tmp_path)).replace("NAME", "mine")
    if kind == "criterion as a string":
        config["criterion"] = SMOOTHED
        (override,) = re.findall(r"`('criterion=[^`]+')`", README)
        command = f"{command[: command.index('criterion.')]} {override}"
    if kind == "sentences":
        config |= {"task": {**SENTENCES, "data": str(sentence_data["class"])}, "model": ROBERTA}
        config["criterion"] = {"_name": "sentence_prediction"}
        (more,) = re.findall(r"`(\+criterion\.[^`]+)`", README)
        command = f"{command.replace(SMOOTHED, 'sentence_prediction')} {more}"
    OmegaConf.save(OmegaConf.create(config), tmp_path / "mine.yaml")
    shell(command, tmp_path)
    saved = torch.load(tmp_path / "saved" / "checkpoint_last.pt")
    assert saved["cfg"]["optimizer"]["_name"] == saved["cfg"]["criterion"]["_name"] == "delta_sam"
    assert tuple(saved["last_optimizer_state"]["param_groups"][0]["betas"]) == (0.9, 0.98)
    assert kind != "translation" or saved["cfg"]["criterion"]["label_smoothing"] == 0.2


def test_python_example_prints_what_is_shown(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("example"))
    assert shell("python example.py", tmp_path) == block("its output")


def test_instruments(translation_data: Path, tmp_path: Path) -> None:
    """They print what is shown, but for the numbers; `make example` has the same runs."""
    options = shlex.join(map(str, [*TOY, "--optimizer", "adam", "--cpu", "--batch-size", 8, "--lr", 0.01]))
    assert block("find_rho").endswith("DATA …\n")
    command = block("find_rho").replace("DATA …", f"{translation_data} {options}")
    assert frame(shell(command, tmp_path)) == frame(printed("suggestion"))
    for name in ("adam", "sam"):
        fairseq_train(translation_data, tmp_path / "runs" / name, *TOY, "--optimizer", "adam", updates=1)
    command = block("sharpness").replace("DATA", str(translation_data))
    assert frame(shell(command, tmp_path)) == frame(printed("per sample"))
    assert {row["checkpoint"] for row in rows(printed("per sample"), "ρ")} == OPTIMIZERS.keys()


@pytest.mark.slow  # downloads the text
def test_the_path_of_a_new_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the data of `make example`, for three updates."""
    monkeypatch.setattr(prepare, "WORK", tmp_path)
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data-bin")
    prepare.main()
    options = f"{tmp_path / 'data-bin'} {shlex.join(SHARED)} --max-update 3 --log-interval 1"
    command = block("path").replace("DATA …", options).replace("find_rho", "find_rho --updates 3 --batches 2")
    command = command.replace("--user-dir deltasam_plugin", f"--user-dir {ROOT / 'deltasam_plugin'}")
    suggestion, _, page = shell(command, tmp_path).partition("This is a suggestion, not a promise.\n")
    assert re.search(r"^batch: --sam-perturbation batch --sam-rho [\d.]+ to [\d.]+$", suggestion, re.MULTILINE)
    assert page.endswith("page.html: 2 runs\n")
    assert "sharpness" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for run in ("adam", "sam"):
        assert len(scalars(tmp_path / "runs" / run, "loss")["loss"]) == 3


def test_report(sentence_data: dict[str, Path], tmp_path: Path) -> None:
    for run, own in OPTIMIZERS.items():
        given: list[object] = [
            *ROBERTA_RUN,
            "--num-classes",
            2,
            *shlex.split(own),
            "--tensorboard-logdir",
            tmp_path / "runs" / run,
        ]
        fairseq_train(sentence_data["class"], tmp_path / run, *given, updates=1)
    assert shell(block("report"), tmp_path) == "report.html: 4 runs\n"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(run in page for run in OPTIMIZERS)


def frame(output: str) -> list[str]:
    """The head of a table and the sentences below it, without numbers."""
    lines = [line for line in output.splitlines() if not re.match(r"\| [-\d]", line)]
    return [re.sub(r" +", " ", re.sub(r"[\d.]+", "N", line)) for line in lines]


def test_own_criterion(translation_data: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(MY_CRITERION + block("criterion"))
    command = ["fairseq-train", translation_data, "--user-dir", "own", *TOY, "--optimizer", "delta_sam", "--cpu"]
    command += ["--criterion", "delta_sam", "--base-criterion", "my_criterion", "--max-update", 2, "--batch-size", 16]
    command += ["--lr", 0.01, "--num-workers", 0, "--log-format", "simple"]
    assert "sam_sharpness" in shell(shlex.join(map(str, command)), tmp_path)


def test_own_weighting(translation_data: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text(block("weighting"))
    command = ["fairseq-train", translation_data, "--user-dir", "own", *TOY, "--optimizer", "delta_sam", "--cpu"]
    command += ["--criterion", "delta_sam", "--sam-weighting", "square_root", "--max-update", 2, "--batch-size", 16]
    command += ["--lr", 0.01, "--num-workers", 0, "--log-format", "simple"]
    assert "sam_ess" in shell(shlex.join(map(str, command)), tmp_path)


def test_weightings_and_their_passes() -> None:
    listed = {row["weighting"].strip("`"): row["passes"] for row in rows(README, "weighting")}
    passes = {name: 0 if own.measure is None else len(own.measure.sides) for name, own in BUILT_IN_WEIGHTINGS.items()}
    assert listed == {name: {0: "0", 1: "K", 2: "2K"}[count] for name, count in passes.items()}


def test_measures_of_a_weighting_of_one_s_own() -> None:
    named = re.search(r'measures="(\w+)"\)  # or (.*)', block("weighting"))
    assert named is not None
    assert {named[1], *named[2].split(", ")} == MEASURES.keys()


def test_criterions_with_logits() -> None:
    listed = re.search(r"Criterions with logits: (.*?)\.\s", README, re.DOTALL)
    assert listed is not None
    base = "label_smoothed_cross_entropy"
    names = {base + n if n.startswith("_") else n for n in re.findall(r"`(\w+)`", listed[1])}
    assert names == {name for name, own in LOGITS.items() if own.__module__.startswith("deltasam_plugin.")}


def test_lengths_of_probes_in_half_precision() -> None:
    said = "for `curvature` 0.03 in fp16 and 0.1 in bf16, for the others 0.03 in bf16"
    assert said in " ".join(README.split())
    least = {name: measure.least_scale for name, measure in MEASURES.items()}
    assert least.pop("second_difference") == {torch.float16: 0.03, torch.bfloat16: 0.1}
    assert all(scales == {torch.bfloat16: 0.03} for scales in least.values())


def test_make_targets() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", pages, re.MULTILINE))
    assert {"example", "test", "test-all", "test-compat", "example-finetune", "example-translation"} <= named
    for target in named:
        shell(f"make -n {target}", ROOT)


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every extra that a page or the Makefile installs is one of setup.py."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    exec(compile((ROOT / "setup.py").read_text(), ROOT / "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    installed = re.findall(r"'\.\[([\w,]+)\]'", "".join(page.read_text() for page in [*PAGES, ROOT / "Makefile"]))
    assert "'.[fairseq]'" in block("install")
    assert {extra for names in installed for extra in names.split(",")} == given["extras_require"].keys()


def test_paths() -> None:
    """Every link and every path names a file or a folder of the repository."""
    for page in PAGES:
        text = FENCED.sub("", page.read_text(encoding="utf-8"))
        links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        links += [ROOT / path for path in re.findall(r"`((?:deltasam_plugin|benchmarks|examples)/[\w/.]+)`", text)]
        assert not [str(path) for path in links if not path.exists() and "work" not in path.relative_to(ROOT).parts], (
            page
        )


def test_options_are_fairseqs_or_the_plugins() -> None:
    known = set(options.get_training_parser()._option_string_actions) | {"--config-dir", "--config-name", "--path"}
    configs = [DeltaSAMOptimizerConfig, DeltaSAMCriterionConfig, *CRITERION_DATACLASS_REGISTRY.values()]
    known |= {f"--{item.name.replace('_', '-')}" for config in configs for item in fields(config)}
    parser = options.get_training_parser()
    ARCH_MODEL_REGISTRY["transformer_tiny"].add_args(parser)
    known |= {*parser._option_string_actions, "--adam-betas"}
    known |= {option for tool in (find_rho, report, sharpness) for option in tool.parser()._option_string_actions}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)) <= known


def test_criterions() -> None:
    listed = re.search(r"Criterions: (.*?)\.\n", README, re.DOTALL)
    assert listed is not None
    base = "label_smoothed_cross_entropy"
    names = {base + n if n.startswith("_") else n for n in re.findall(r"`(\w+)`", listed[1])}
    assert names == BUILT_IN_LOSSES.keys()


def test_recipes() -> None:
    """What becomes of each is what test_recipes pins: it trains, or is refused with these words."""
    table = rows(README, "recipe")
    assert len(table) == len(ALL)
    for row, recipe in zip(table, ALL, strict=True):
        name, url = re.fullmatch(r"\[(.+)\]\((.+)\)", row["recipe"]).groups()
        assert (name, url.partition("/blob/main/")[2]) == (recipe.name, recipe.source)
        for mode in ("batch", "instance"):
            assert row[mode].removeprefix("refused: ") in recipe.outcome(mode), (name, mode)
            assert (recipe.outcome(mode) == TRAINS) == (row[mode] == "trains"), (name, mode)
    batch, instance = (sum(recipe.outcome(mode) == TRAINS for recipe in ALL) for mode in ("batch", "instance"))
    said = (
        f"Of {len(ALL)} recipes from fairseq's `examples`, {batch} train in batch mode and {instance} in instance mode."
    )
    assert said in " ".join(README.split())
    assert f"All {len(ALL)} recipes" in README


def test_options_and_their_defaults() -> None:
    found = [item for config in (DeltaSAMOptimizerConfig, DeltaSAMCriterionConfig) for item in fields(config)]
    defaults = {f"`--{item.name.replace('_', '-')}`": item.default for item in found if item.name != "_name"}
    expected = {name: "off" if value is False else str(value) for name, value in defaults.items()}
    expected |= {"`--sam-rho`": f"{DEFAULT_RHO['batch']}; `instance`: {DEFAULT_RHO['instance']}"}
    expected |= {"`--sam-parameters`": "all", "`--sam-loss-budget`": "none"}
    weights = {name: own.weight for name, own in DESCENTS.items() if own.weight is not None}
    expected |= {"`--sam-descent-weight`": "; ".join(f"`{name}`: {weight:g}" for name, weight in weights.items())}
    assert {row["option"]: row["default"] for row in rows(README, "option")} == expected


def test_scalars() -> None:
    meanings = {row["scalar"].strip("`"): row["meaning"] for row in rows(README, "scalar")}
    assert meanings == MEANINGS
    listed = meanings.keys()
    assert listed == {"loss", "sam_rho", *(f"sam_{item.name}" for item in fields(Statistics))}
    assert set(re.findall(r"`(sam_\w+)`", README)) <= listed


@pytest.mark.parametrize("example", ["sentiment", "finetune"])
def test_an_example_shows_a_table_as_it_prints_it(example: str) -> None:
    results = rows((ROOT / "examples" / example / "README.md").read_text(), "run")
    assert tuple(results[0]) == TITLES
    assert [row["run"] for row in results] == list(OPTIMIZERS)[: len(results)]


def test_fidelity_is_that_of_the_file_of_measurements() -> None:
    printed, page = fidelity.report(fidelity.rows()), (ROOT / "benchmarks" / "README.md").read_text()
    errors, _, _, counts = re.findall(r"(?:^\|.*\n?)+", printed, re.MULTILINE)
    for shown in (errors, counts):
        assert shown.strip() in page
    found = {row["weights or groups"]: row for row in rows(counts + "\n", "weights or groups")}
    cases = int(found["curvature"]["cases"])
    results = " ".join(README[README.index("## What you get") : README.index("## Install")].split())
    assert f"in {cases} cases](benchmarks/README.md#how-near" in results
    assert all(found[name]["nearer, corrected"] == "0" for name in BUILT_IN_WEIGHTINGS if name != "uniform")


def test_accuracies_are_those_of_the_file_of_results() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    results = accuracy.rows()
    assert len(rows(f"{overview(results)}\n", "training")) > 2
    assert overview(results) in README
    assert summary(results) in page
    assert tables(results) in page
    assert tuning(results) in page
    assert accuracy.legend() in page


def test_the_grid_over_the_radius_is_that_of_the_file_of_results() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    found = radii.results()
    assert len(found) > 10
    for task in dict.fromkeys(radius.task for radius in found):
        assert f"{TASKS[task].title}\n\n{radii.grid(task)}\n" in page


def test_costs_of_methods_are_those_of_the_table_of_choices() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    measured = {row["choice"]: row["seconds, memory"].split()[0] for row in rows(page, "choice")}
    shown = [cost for row in rows(README, "method") for cost in row["cost"].split("; ")]
    assert len(measured) > 1
    for choice, ratio in measured.items():
        mode, _, name = choice.rpartition(", ")
        cost = (
            f"Adam alone: {ratio}"
            if name == "Adam"
            else f"`instance`: {ratio}"
            if mode and name != "group 4"
            else ratio
        )
        assert cost in shown, choice


def test_costs_are_those_of_the_full_table() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text()
    sizes, full = ("width", "tokens", "batch"), rows(page, "width")
    shown = {tuple(row.pop(size) for size in sizes): row for row in rows(README, "width")}
    ratios = {tuple(row.pop(size) for size in sizes): row for row in full}
    assert len(shown) == 3
    for case, row in shown.items():
        assert row.pop("SAM") == "1, 1"
        for method, cell in row.items():
            seconds, _, _, memory = re.findall(r"[\d.]+", ratios[case][method])
            assert cell.strip("*") == f"{seconds}, {memory}", (case, method)
    instance = [re.findall(r"[\d.]+", row["instance"]) for row in ratios.values()]
    time, memory = (sorted((numbers[index] for numbers in instance), key=float) for index in (0, 3))
    said = f"takes {time[0]}–{time[-1]} times SAM's time and {memory[0]}–{memory[-1]} times its memory"
    assert said in " ".join(README.split())
    methods = [row["method"] for row in rows(page, "method")]
    assert set(methods) - {"SAM"} == ratios[next(iter(ratios))].keys() - {"SAM, s", "loop : instance"}
