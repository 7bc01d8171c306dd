"""lm-evaluation-harness on what was trained: own tasks without a network, and every mistake before the model is loaded."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from axolotl.config import Hardware, load_config
from axolotl.errors import ConfigError, DataError, EnvironmentProblem
from axolotl.inference.benchmarks import Score, check_tasks, scores, table
from axolotl.run import lm_eval as verb
from axolotl.run.beforehand import problems_beforehand
from scripted import LLAMA, scripted

TEXT = "The old blue house"
Command = Callable[..., subprocess.CompletedProcess[str]]


def config(folder: Path, **keys: Any) -> Path:
    plain = {
        "base_model": LLAMA,
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
        "chat_template": "llama3",
        "micro_batch_size": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "output_dir": str(folder / "out"),
        **keys,
    }
    file = folder / "config.yml"
    file.write_text(yaml.safe_dump(plain))
    return file


def own_task(folder: Path, name: str = "houses", **keys: Any) -> Path:
    """A task whose model has to say TEXT: right in one row of two."""
    rows = folder / f"{name}.jsonl"
    rows.write_text("".join(json.dumps({"q": "hi", "a": a}) + "\n" for a in (TEXT, "something else")))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **keys,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(task))
    return file


def trained(folder: Path) -> None:
    """A whole model that was trained to say TEXT."""
    loaded = scripted(
        TEXT, data={"chat_template": "llama3", "datasets": [{"path": "x", "type": "chat_template"}]}
    )
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


@pytest.mark.extras
def test_own_tasks_through_the_command(tmp_path: Path, axolotl: Command) -> None:
    trained(tmp_path / "out")
    file = config(tmp_path, lm_eval_tasks=[str(own_task(tmp_path))], lm_eval_batch_size=2)
    done = axolotl("lm-eval", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["scores"] == {"houses": {"exact_match": 0.5}}
    assert figures["chat_template"] is True
    assert "exact_match" in done.stderr
    kept = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert kept["harness"]["n-samples"]["houses"] == {"original": 2, "effective": 2}
    done = axolotl("lm-eval", file, "--limit", "1", "--lm-eval-model", str(tmp_path / "out"), cwd=tmp_path)
    assert json.loads(done.stdout)["scores"] == {"houses": {"exact_match": 1.0}}, done.stderr
    # Laid out in another way than it was trained, the model is not itself.
    done = axolotl("lm-eval", file, "--untrained", "--no-apply-chat-template", cwd=tmp_path)
    assert json.loads(done.stdout) == {
        "model": LLAMA,
        "chat_template": False,
        "limit": None,
        "scores": {"houses": {"exact_match": 0.0}},
    }, done.stderr


@pytest.mark.extras
def test_benchmarks_at_the_end_of_a_run(tmp_path: Path, axolotl: Command) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": TEXT}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
    keys = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "max_steps": 1}
    file = config(tmp_path, lm_eval_tasks=[str(own_task(tmp_path))], **keys)
    done = axolotl("train", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert figures["model"].endswith(f" + {tmp_path / 'out'}")
    assert set(figures["scores"]) == {"houses"}


@pytest.mark.extras
def test_mistakes_are_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verb, "load_trained", lambda *_, **__: pytest.fail("the model was loaded"))
    for tasks, error, words in (
        (["arc_eazy"], ConfigError, "`arc_eazy` is no task of lm-evaluation-harness"),
        ([str(tmp_path / "no.yaml")], ConfigError, "does not exist"),
        (
            [str(own_task(tmp_path, dataset_path="nobody/nothing", dataset_kwargs={}))],
            DataError,
            "cannot be had",
        ),
    ):
        cfg = load_config(str(config(tmp_path, lm_eval_tasks=tasks)))
        with pytest.raises(error, match=words) as told:
            verb.lm_eval(cfg)
        assert "lm_eval_tasks" in told.value.problems[0].keys
        assert told.value.problems[0].places
    cfg = load_config(str(config(tmp_path, lm_eval_tasks=["arc_eazy"])))
    found = [
        p for p in problems_beforehand(cfg, Hardware(device="cpu"), data=False) if "lm_eval_tasks" in p.keys
    ]
    assert len(found) == 1 and "arc_easy" in found[0].remedy


def test_without_a_task_or_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="names no task"):
        verb.lm_eval(load_config(str(config(tmp_path))))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert check_tasks(None) == []
    [problem] = check_tasks(["arc_easy"])
    assert (problem.code, problem.keys) == ("AX1404", ("lm_eval_tasks",))
    with pytest.raises(EnvironmentProblem, match="lm_eval"):
        verb.lm_eval(load_config(str(config(tmp_path, lm_eval_tasks=["arc_easy"]))))


def test_a_failure_after_training_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(verb, "lm_eval", fail)
    verb.after_training(load_config(str(config(tmp_path))))
    verb.after_training(load_config(str(config(tmp_path, lm_eval_tasks=["x"], lm_eval_post_train=False))))
    assert capsys.readouterr().err == ""
    verb.after_training(load_config(str(config(tmp_path, lm_eval_tasks=["x"]))))
    told = " ".join(capsys.readouterr().err.split())
    assert "did not run: RuntimeError: broken" in told
    assert "axolotl lm-eval" in told


def test_figures_of_a_result() -> None:
    result = {
        "results": {
            "math": {
                "alias": " - math",
                "exact_match,strict": 0.25,
                "exact_match_stderr,strict": 0.1,
                "acc,none": 1,
                "acc_stderr,none": "N/A",
            }
        },
        "n-shot": {"math": 5},
    }
    found = scores(result)
    assert found == [
        Score("math", 5, "strict", "exact_match", 0.25, 0.1),
        Score("math", 5, "", "acc", 1.0, None),
    ]
    assert table(found) == [
        "task  shots  metric                value   ±",
        "math  5      exact_match (strict)  0.2500  0.1000",
        "math  5      acc                   1.0000",
    ]
