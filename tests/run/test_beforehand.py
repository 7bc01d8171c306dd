"""What is wrong with a run is told before any work: all of it, with places, by `check` and by `train` alike."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from axolotl.config import Hardware
from axolotl.errors import ConfigError, Problem, UserError
from axolotl.plan.check import load_config
from axolotl.run.beforehand import problems_beforehand
from axolotl.run.check import check
from axolotl.run.preprocess import preprocess
from axolotl.run.train import train

MODEL = Path(__file__).parents[1] / "fixtures" / "tiny-llama3"
CPU = Hardware(cpus=2)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(more) → the path of a config that is right but for the lines of `more`."""
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": "say a", "output": "a"}] * 4
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {
        "base_model": MODEL,
        "datasets": "[{path: rows.jsonl, type: alpaca}]",
        "output_dir": "out",
        "micro_batch_size": 1,
        "learning_rate": "1e-4",
    }

    def write(more: str = "") -> Path:
        mine = {line.partition(":")[0] for line in more.splitlines()}
        lines = [f"{key}: {value}" for key, value in base.items() if key not in mine]
        Path("c.yml").write_text("\n".join([*lines, more]) + "\n")
        return Path("c.yml")

    return write


def fatal(problems: object) -> list[Problem]:
    return [p for p in problems if p.fatal]  # type: ignore[attr-defined]


@pytest.fixture
def bare(monkeypatch):
    """A machine without optional packages."""
    found = importlib.util.find_spec
    optional = {"wandb", "mlflow", "bitsandbytes", "schedulefree", "torchao"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in optional else found(name, *rest)
    )


WRONG = [
    ("wandb_project: mine", "wandb_project"),
    ("use_mlflow: true", "use_mlflow"),
    ("optimizer: schedule_free_adamw", "optimizer"),
    ("optimizer: paged_adamw_8bit", "optimizer"),
    ("optimizer: ao_adamw_8bit", "optimizer"),
    (
        "adapter: qlora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\nload_in_4bit: true",
        "load_in_4bit",
    ),
    ("attn_implementation: flex_attention", "attn_implementation"),
    ("chat_template: jinja\nchat_template_jinja: ./nope.jinja", "chat_template_jinja"),
    ("tokenizer_config: ./nope", "tokenizer_config"),
    ("tokenizer_type: Foo", "tokenizer_type"),
    ("model_type: Bar", "model_type"),
    ("device: cuda", "device"),
    ("device: cpuu", "device"),
    ("resume_from_checkpoint: nope", "resume_from_checkpoint"),
    ("dataset_prepared_path: /proc/prepared", "dataset_prepared_path"),
    ("output_dir: /proc/out", "output_dir"),
    ("base_model: ./nomodel", "base_model"),
    ("datasets: [{path: nope.jsonl, type: alpaca}]", "datasets[0].path"),
]


@pytest.mark.parametrize(("more", "key"), WRONG, ids=[key + str(i) for i, (_, key) in enumerate(WRONG)])
def test_a_mistake_is_told_with_its_line_by_check_and_train(config, bare, more: str, key: str) -> None:
    file = config(more)
    line = next(
        i for i, text in enumerate(file.read_text().splitlines(), 1) if text.startswith(key.split("[")[0])
    )
    [problem] = fatal(check(load_config(file)))
    if problem.keys:
        assert problem.keys[0] == key
    assert [p.line for p in problem.places] == [line]
    assert problem.remedy
    with pytest.raises(UserError) as caught:
        train(load_config(file))
    assert [(p.message, p.places[0].line) for p in caught.value.problems] == [(problem.message, line)]
    assert not Path("out").exists() and not Path("last_run_prepared").exists()


def test_fp8_without_a_gpu_is_told_with_its_line(config, bare) -> None:
    file = config("fp8: true\ntorch_compile: true")
    found = fatal(check(load_config(file)))
    assert [p.keys for p in found] == [("fp8",), ("fp8",)]
    assert "there is no NVIDIA GPU" in found[0].message and "torchao" in found[1].message
    assert len({p.places[0].line for p in found}) == 1
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        train(load_config(file))


def test_all_mistakes_are_told_at_once(config, bare) -> None:
    more = "\n".join(
        [
            "output_dir: /proc/out",
            "base_model: ./nomodel",
            "datasets: [{path: nope.jsonl, type: alpaca}]",
            "attn_implementation: flex_attention",
            "optimizer: adamw_8bit",
            "wandb_project: mine",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        train(load_config(config(more)))
    assert {p.places[0].line for p in caught.value.problems} == {3, 4, 5, 6, 7, 8}


def test_a_run_that_is_right_does_not_open_its_data_twice(config, monkeypatch) -> None:
    monkeypatch.setattr("axolotl.run.rows_beforehand.open_source", pytest.fail)
    assert problems_beforehand(load_config(config()), CPU, data=False) == []


def test_names_are_looked_at_once_plugins_are_there(config, tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugin_of_nothing.py").write_text("")
    (tmp_path / "plugin_that_fails.py").write_text("raise ValueError('no')")
    [problem] = fatal(check(load_config(config("plugins: [plugin_of_nothing]\noptimizer: adamwww"))))
    assert (problem.keys, problem.places[0].line) == (("optimizer",), 7)
    [problem] = fatal(check(load_config(config("plugins: [plugin_that_fails]"))))
    assert "ValueError: no" in problem.message
    assert problem.places[0].line == 6


@pytest.mark.parametrize(
    ("more", "told"), [("", True), ("rope_scaling: {rope_type: linear, factor: 9}", False)]
)
def test_rows_longer_than_the_model_was_made_for_are_told(config, more: str, told: bool) -> None:
    longest = json.loads((MODEL / "config.json").read_text())["max_position_embeddings"]
    override = f"overrides_of_model_config: {{{more}}}" if more else ""
    cfg = load_config(config(f"sequence_len: {longest + 1}\n{override}"))
    found = [p for p in problems_beforehand(cfg, CPU, data=False) if "max_position_embeddings" in p.message]
    assert len(found) == told
    assert all(
        p.kind == "warning" and f"{longest + 1:,}" in p.message and f"{longest:,}" in p.message for p in found
    )
    cfg = load_config(config(f"sequence_len: {longest}"))
    assert not [p for p in problems_beforehand(cfg, CPU, data=False) if "max_position" in p.message]


def chat(config, rows: list[object], entry: str = "", more: str = "chat_template: llama3") -> list[Problem]:
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = f"datasets: [{{path: chat.jsonl, type: chat_template{entry}}}]"
    return list(check(load_config(config(f"{datasets}\n{more}"))))


TURNS = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "yes"}]


def test_check_looks_at_the_first_rows(config) -> None:
    good = {"messages": TURNS}
    assert not chat(config, [good] * 9)
    nothing = {"messages": [TURNS[0], {"role": "assistant", "content": None}]}
    [problem] = fatal(chat(config, [*[good] * 50, nothing]))
    assert problem.places[0].line == 51
    thought = {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm."}]}
    problem = chat(config, [good, thought], more="chat_template: chatml")[-1]
    assert problem.kind == "warning"
    assert "does not write reasoning (1 times in the first 2 rows)" in problem.message
    [problem] = fatal(chat(config, [good, nothing]))
    assert problem.places[0].line == 2
    [problem] = fatal(chat(config, [good], ", message_property_mappings: {role: frm}"))
    assert "frm" in problem.message
    jinja = "chat_template: jinja\nchat_template_jinja: '{% for m in messages %}{{ m.contnt }}{% endfor %}'"
    [problem] = fatal(chat(config, [good], more=jinja))
    assert "writes nothing" in problem.message
    [problem] = chat(config, [good] * 3, ", roles_to_train: [tool]")
    assert (problem.kind, "first 3 rows" in problem.message) == ("warning", True)


@pytest.mark.parametrize(
    ("entry", "remedy"),
    [
        ("type: completion, field: txt", "`field: text`"),
        ("type: completion, field: xyz", "`field: text`"),
        ("type: chat_template, ds_type: csv", "`ds_type: json`"),
    ],
)
def test_the_remedy_is_the_option_that_is_wrong(config, entry: str, remedy: str) -> None:
    Path("text.jsonl").write_text('{"text": "a red fox"}\n')
    [problem] = fatal(check(load_config(config(f"datasets: [{{path: text.jsonl, {entry}}}]"))))
    assert remedy in problem.remedy


def test_preprocess_tells_all_mistakes_that_concern_rows(config) -> None:
    Path("bad.jsonl").write_text('{"instruction": "say a", "output": {}}\n')
    more = """tokenizer_config: ./nope
datasets: [{path: nope.jsonl, type: alpaca}, {path: bad.jsonl, type: alpaca}]
chat_template: jinja
chat_template_jinja: ./nope.jinja
dataset_prepared_path: /proc/prepared"""
    cfg = load_config(config(more))
    with pytest.raises(UserError) as caught:
        preprocess(cfg)
    keys = [key for problem in caught.value.problems for key in problem.keys]
    assert {"dataset_prepared_path", "tokenizer_config", "chat_template_jinja"} <= set(keys)
    assert any("`nope.jsonl`" in problem.message for problem in caught.value.problems)


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
def test_a_base_that_this_machine_cannot_read_is_told_with_its_line(config, tmp_path, scheme) -> None:
    (tmp_path / "base").mkdir()
    for file in Path(MODEL).iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    said = tmp_path / "base" / "config.json"
    held = json.loads(said.read_text()) | {"quantization_config": {"quant_method": scheme, "bits": 4}}
    said.write_text(json.dumps(held))
    lora = "base_model: base\nadapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true"
    cfg = load_config([config(lora)], [], verb="train")
    (told,) = fatal(problems_beforehand(cfg, CPU, data=False))
    assert told.message == f"`base_model: base` holds {scheme} weights, which need a GPU."
    assert told.places[0].line == 5
    cfg = load_config([config("base_model: base")], [], verb="train")
    (told,) = fatal(problems_beforehand(cfg, CPU, data=False))
    assert "cannot be trained themselves" in told.message


def test_wrong_keys_hide_no_mistakes_of_files_and_rows(
    axolotl: Callable[..., CompletedProcess[str]], tmp_path: Path, tiny_llama3: Path
) -> None:
    """Rows are rendered where all keys about data and model are right; else files and columns are looked at."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    file = tmp_path / "config.yml"
    text = (
        f"base_model: {tiny_llama3}\nlearning_rate: fast\nlora_rnk: 8\n"
        f"datasets:\n- {{path: {rows}, type: chat_template}}\n- {{path: {tmp_path}/none.jsonl, type: completion}}\n"
    )
    file.write_text(text)
    done = axolotl("check", file)
    assert done.returncode == 2, done.stderr
    for said in ("config.yml:2:16", "config.yml:3:1", "has the role `usr`", "none.jsonl` does not exist"):
        assert said in done.stderr, said
    file.write_text(text + "chat_templte: chatml\n")
    done = axolotl("check", file)
    assert "`chat_templte`" in done.stderr and "none.jsonl` does not exist" in done.stderr
    assert "`usr`" not in done.stderr, "with which template is not known"
