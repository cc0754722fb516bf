import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import model_zoo
import rb_noisy
from eval.leaderboard import leaderboard_rows, render_markdown
from eval.report import collect_runs, nl_report, sglr_report
from eval.report_table import render_markdown as render_report
from model_zoo.registry import read_cards

README = Path(__file__).parents[1] / "README.md"
STUDIES = Path(model_zoo.__file__).parent / "studies"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="the README is in the repository, not in the package")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("dataset", ["digits", "mnist", "cifar10_jpeg"])
def test_the_tables_are_those_of_the_cards(dataset):
    cards = [card for card in read_cards() if card["dataset"] == dataset]
    table = render_markdown(leaderboard_rows(cards, []))
    assert table.strip() in README.read_text(encoding="utf-8")


def test_the_first_example_runs_as_it_stands():
    example = next(block for block in blocks("python") if "load_model" in block)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["attack"].kappa.shape == (540,)


def test_the_image_folder_example_answers_or_abstains_for_each_image(tmp_path, monkeypatch, capsys):
    example = next(block for block in blocks("python") if "abstain" in block)
    images = (rb_noisy.load_data("digits").x_test[:12, 0] * 255).round().to(torch.uint8).numpy()
    (tmp_path / "my_images").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "my_images" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"{number:02}.png" for number in range(12)]
    for _, label, confidence, decision in lines:
        assert label in "0123456789"
        if confidence != "0.90":  # rounded
            assert decision == ("answer" if float(confidence) > 0.9 else "abstain")
    assert {line[3] for line in lines} == {"answer", "abstain"}
    assert (tmp_path / "confidence.json").is_file()


def test_both_set_up_commands_are_there():
    first, second = (block.strip() for block in blocks("bash")[:2])
    assert first.startswith("python3 -m venv")
    assert first.endswith("-m eval --model sglr_digits --batch-size 540")
    assert second.startswith("python3 -m venv")
    assert second.endswith("pytest")


# The columns in which the README shows each study that ships its metrics.
COLUMNS = {
    "digits-methods": sglr_report,
    "digits-table4": sglr_report,
    "mnist-noise": nl_report,
    "refinement-cifar": sglr_report,
    "refinement-mnist": sglr_report,
}


@pytest.mark.parametrize(
    "study", sorted({path.name for path in STUDIES.glob("*") if path.is_dir()} - {"digits-figures"})
)
def test_the_tables_of_the_studies_are_those_of_the_shipped_metrics(study):
    runs = collect_runs([STUDIES / study])
    for against in (None, "pgd-at+kgr") if study.startswith("refinement") else (None,):
        table = render_report(COLUMNS[study](runs, against))
        assert table.strip() in README.read_text(encoding="utf-8")
