"""Corrections that do not fit the data; those that do come from the page in test_gallery.py."""

from dataclasses import replace

import pytest
import torch

from rb_noisy.corrections import apply_corrections, save_npz
from rb_noisy.data import Dataset
from rb_noisy.errors import InputError


@pytest.fixture
def tiny():
    images, labels = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1])
    return Dataset("tiny", images, labels, images, labels.clone(), ("cat", "dog"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("given,label\r\ncat,dog\r\n", "has no column 'index'"),
        ("", "has no column 'index'"),
        ("index,given,label\r\n", "holds no corrections"),
        ("index,given,label\r\n1,dog\r\n", "line 2 of .* more or fewer cells"),
        ("index,given,label\r\n1,dog,cat,cat\r\n", "line 2 of .* more or fewer cells"),
        ("index,given,label\r\n1,dog,cta\r\n", "label in line 2 .* unknown class 'cta'; did you mean cat"),
        ("index,given,label\r\n1,dgo,cat\r\n", "given in line 2 .* did you mean dog"),
        ("index,given,label\r\n4,cat,dog\r\n", "index '4' in line 2 .* they are 0 to 3"),
        ("index,given,label\r\n-1,cat,dog\r\n", "index '-1'"),
        ("index,given,label\r\nx,cat,dog\r\n", "index 'x'"),
        ("index,given,label\r\n0,cat,dog\r\n0,cat,dog\r\n", "line 3 .* corrects sample 0, as line 2 does"),
        ("index,given,label\r\n0,dog,cat\r\n", "corrects 'dog' of sample 0, which is 'cat' in tiny"),
        ("index,file,given,label\r\n0,b.png,cat,dog\r\n", "corrects 'b.png', but sample 0 of tiny is 'a.png'"),
        (b"index,given,label\r\n0,H\xfcndin,dog\r\n", "cannot be read as CSV"),
        ("index;given;label\n0;cat;dog\n", "separated by semicolons: save it with commas"),
        ("index,file,given,label\n0,ba.png,cat,dog\n", "files were added or removed"),
    ],
)
def test_corrections_that_do_not_fit_are_named(text, words, tiny, tmp_path):
    (tmp_path / "c.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words):
        apply_corrections(tiny, tmp_path / "c.csv", ["a.png"] * 4)
    assert tiny.y_train.tolist() == [0, 1, 0, 1]


def test_what_cannot_be_corrected_or_saved_is_named(tiny, tmp_path):
    with pytest.raises(InputError, match="two classes called 'cat'"):
        apply_corrections(replace(tiny, class_names=("cat", "cat")), "nowhere.csv")
    with pytest.raises(InputError, match=r"nowhere.csv cannot be read"):
        apply_corrections(tiny, "nowhere.csv")
    with pytest.raises(InputError, match=r"ends in .npz"):
        save_npz(tiny, tmp_path / "data.csv")


def test_a_file_may_be_named_with_the_folder_of_the_data_as_in_the_ranking(tiny, tmp_path):
    (tmp_path / "c.csv").write_text("index,file,given,label\n0,/data/pets/train/a.png,cat,dog\n")
    assert apply_corrections(tiny, tmp_path / "c.csv", ["a.png"] * 4).y_train.tolist() == [1, 1, 0, 1]


def test_a_spreadsheet_may_have_been_between_page_and_data(tiny, tmp_path):
    """It writes a byte order mark, other line ends and no more quotes than it needs."""
    (tmp_path / "c.csv").write_text("index,given,suggested,label\n2,cat,dog,dog\n1,dog,cat,dog\n", "utf-8-sig")
    assert apply_corrections(tiny, tmp_path / "c.csv").y_train.tolist() == [0, 1, 1, 1]
    assert tiny.y_train.tolist() == [0, 1, 0, 1]
