"""A model of somebody else keeps his name and his terms: from a folder, the Hub's cache, or the Hub."""

import pytest
from huggingface_hub import ModelCard
from report_example import example_report

from optimum_clp.configuration.clp_config import CLPConfig
from optimum_clp.report import origin
from optimum_clp.report.model_card import write_model_card
from optimum_clp.report.origin import LICENSE_FILES, Origin, copy_files, find_origin, origin_folder
from optimum_clp.report.section import to_section

CARD = """---
license: other
license_name: acme-community
license_link: LICENSE
base_model:
- acme/parent-7b
---
# Acme
"""


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "models--acme--chat-7b" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("terms")
    (folder / "Notice.txt").write_text("notice")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def card_of(report, folder):
    write_model_card(report, CLPConfig(), folder)
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def report_of(name, **changes):
    report = example_report()
    report.base_model.update(name_or_path=str(name), **changes)
    return report


def test_a_folder_of_the_hubs_cache_keeps_name_link_and_terms(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    assert copy_files(origin_folder(str(base), LICENSE_FILES), out, LICENSE_FILES) == ["LICENSE", "Notice.txt"]
    data, text = card_of(report_of(base), out)
    assert (data["base_model"], data["base_model_relation"]) == ("acme/chat-7b", "finetune")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "acme-community", "LICENSE")
    assert "[acme/chat-7b](https://huggingface.co/acme/chat-7b)" in text and str(tmp_path) not in text
    (out / "LICENSE").unlink()
    assert card_of(report_of(base), out)[0]["license_link"] == "https://huggingface.co/acme/chat-7b/blob/main/LICENSE"


def test_a_local_folder_names_what_it_was_made_from(base, tmp_path):
    own = base.rename(tmp_path / "my-chat")
    data, text = card_of(report_of(own), tmp_path)
    assert data["base_model"] == "acme/parent-7b" and data["license"] == "other"
    assert "`my-chat`, which was made from [acme/parent-7b](https://huggingface.co/acme/parent-7b)" in text


def test_what_was_found_once_stays_in_the_report(base, tmp_path):
    known = to_section(find_origin(str(base)))
    assert Origin(**known) == Origin("acme/chat-7b", "acme/parent-7b", "other", "acme-community", "LICENSE", True)
    # as an upload writes the card: the folder's name is nobody's business
    report = report_of(base, origin=known)
    report.base_model["name_or_path"] = None
    data, text = card_of(report, tmp_path)
    assert data["base_model"] == "acme/chat-7b" and data["license_name"] == "acme-community"
    assert "# acme/chat-7b" not in text and "[acme/chat-7b]" in text


def test_the_cache_answers_where_there_is_no_network(base, monkeypatch):
    monkeypatch.setattr(origin, "snapshot_download", lambda name, **options: str(base))
    assert find_origin("acme/chat-7b") == Origin(
        "acme/chat-7b", "acme/parent-7b", "other", "acme-community", "LICENSE", True
    )
    monkeypatch.setattr(origin, "snapshot_download", lambda name, **options: pytest.fail("asked"))
    assert find_origin(None) == Origin() and find_origin("/no/such/folder") == Origin()


@pytest.mark.parametrize(
    "card", ["", "---\nlicense: [1\n---\n", "---\nlicense: 5\n---\n", "---\n- a\n---\n", "\ufeff"]
)
def test_a_card_that_is_not_valid_is_no_card(card, base):
    (base / "README.md").write_text(card)
    found = find_origin(str(base))
    assert (found.repository, found.license) == ("acme/chat-7b", None)


def test_folders_and_links_into_nothing_are_passed_over(base, tmp_path):
    (base / "LICENSES").mkdir()
    (base / "license.lnk").symlink_to(tmp_path / "none")
    out = tmp_path / "out"
    out.mkdir()
    (out / "LICENSE").write_text("its own")
    assert copy_files(base, out, LICENSE_FILES) == ["Notice.txt"]
    assert (out / "LICENSE").read_text() == "its own"
    assert copy_files(None, out, LICENSE_FILES) == [] == copy_files(tmp_path / "none", out, LICENSE_FILES)
