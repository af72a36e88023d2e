"""The page of architectures is what the suite found, for every member of the zoo and every type that transformers has."""

from architecture_record import COLUMNS, MAJOR, TABLE, load_record, page
from transformers import CONFIG_MAPPING
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from zoo import ZOO

from optimum_clp.architecture.table import BUILT_IN, REFUSED

STALE = "run `make architectures`"


def test_the_table_is_made_from_the_record():
    assert TABLE.read_text() == page(TABLE.read_text()), STALE


def test_the_record_is_of_this_zoo_and_this_transformers():
    record = load_record()[MAJOR]
    assert record["transformers"] == transformers_version, STALE
    assert record["types"].keys() == {tiny.name for tiny in ZOO}, STALE
    assert {name for name, columns in record["types"].items() if columns.keys() != set(COLUMNS)} == set(), STALE


def test_every_causal_language_model_of_transformers_is_cut_or_refused_with_a_reason():
    # some names share a config class, and so a model_type, with another
    own = {t for t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if CONFIG_MAPPING[t].model_type == t}
    assert own - BUILT_IN.keys() - REFUSED.keys() == set()
    assert not BUILT_IN.keys() & REFUSED.keys()


def test_every_type_that_is_cut_is_in_the_zoo():
    # opened as the text models that they hold; tests/test_containers.py has them with their other parts
    outer = {"gemma4", "gemma4_unified", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"}
    known = {t for t in BUILT_IN if t in CONFIG_MAPPING} - outer
    one_version_only = {"recurrent_gemma", "xlstm"} if MAJOR == "4" else set()
    assert known - {tiny.model_type for tiny in ZOO} == one_version_only
