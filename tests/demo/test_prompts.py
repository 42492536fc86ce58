import pytest

from speclm.demo.bundle import load_prompts
from speclm.errors import OptionError

ROWS = {"sql_dev": 100, "gsm8k_dev": 100, "sql_tune": 50, "gsm8k_tune": 50}


@pytest.mark.parametrize("name", ROWS)
def test_conversations_are_well_formed_and_end_with_the_user(name):
    prompts = load_prompts(name)
    roles = ["system", "user"] if name.startswith("sql") else ["user"]
    assert len(prompts) == ROWS[name]
    for messages in prompts:
        assert [message["role"] for message in messages] == roles
        assert all(message.keys() == {"role", "content"} for message in messages)
        assert all(message["content"].strip() for message in messages)


@pytest.mark.parametrize("task", ["sql", "gsm8k"])
def test_tuning_prompts_are_not_reported_on(task):
    dev, tune = load_prompts(f"{task}_dev"), load_prompts(f"{task}_tune")
    assert not any(messages in dev for messages in tune)


def test_limit_keeps_the_first_conversations():
    assert load_prompts("sql_dev", limit=3) == load_prompts("sql_dev")[:3]
    assert load_prompts("sql_dev", limit=0) == []


def test_negative_limit_is_refused():
    with pytest.raises(OptionError, match=r"limit to be at least 0.*-1"):
        load_prompts("sql_dev", limit=-1)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"gsm8k_dev.*sql_tune.*'sql_test'"):
        load_prompts("sql_test")
