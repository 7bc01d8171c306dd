"""From text to Config: values, places, several files, overrides, the environment, and all problems at once."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from axolotl.cli.overrides import parse_overrides
from axolotl.config import Config, Hardware, load_config, resolve
from axolotl.config.data import DataSection, DatasetEntry
from axolotl.config.optim import OptimSection
from axolotl.config.secrets import masked
from axolotl.config.train import TrainSection
from axolotl.errors import ConfigError, Problem

BASE = "base_model: x\ndatasets: [{path: a.jsonl, type: alpaca}]\nlearning_rate: 1e-4\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a config in an empty current folder, so that places are short."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "c.yml") -> Path:
        Path(name).write_text(text, encoding="utf-8")
        return Path(name)

    return write


def told(*args: object, **kwargs: object) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)  # type: ignore[arg-type]
    return list(caught.value.problems)


def one(*args: object, **kwargs: object) -> Problem:
    [problem] = told(*args, **kwargs)
    return problem


# Values


def test_values_and_defaults(write: Write) -> None:
    cfg = load_config(
        write(BASE + "lora_r: 8.0\nbf16: yes\nsave_strategy: no\nwandb_run_id: 0012\ntokens: [1, a]\n")
    )
    assert (cfg.adapter.lora_r, cfg.model.bf16, cfg.train.save_strategy) == (8, True, "no")
    assert (cfg.tracking.wandb_run_id, cfg.model.tokens) == ("0012", ["1", "a"])
    assert cfg.optim.learning_rate == 1e-4
    assert (cfg.data.sequence_len, cfg.train.seed, cfg.output.gradio_share) == (512, None, False)
    assert cfg.data.datasets[0] == DatasetEntry(path="a.jsonl", type="alpaca")
    assert cfg.model.trust_remote_code is False


def test_null_false_and_empty_mean_not_set(write: Write) -> None:
    cfg = load_config(
        write(BASE + 'adapter:\nlora_r: false\nwandb_project: ""\nchat_template: null\nfsdp_config: {}\n')
    )
    assert (cfg.adapter.adapter, cfg.adapter.lora_r, cfg.tracking.wandb_project) == (None, None, None)
    assert not cfg.is_set("adapter")
    assert not cfg.is_set("wandb_project")
    assert cfg.origin("adapter").kind == "default"


def test_sections_can_be_built_alone() -> None:
    data = DataSection.model_validate({"datasets": [{"path": "x", "type": None}], "chat_template": None})
    assert data.datasets[0].type is None
    assert TrainSection.model_validate({"max_steps": -1}).max_steps is None
    assert OptimSection(learning_rate=1e-3).optimizer == "adamw_torch_fused"


def test_a_config_cannot_be_written_to(write: Write) -> None:
    cfg = load_config(write(BASE))
    with pytest.raises(Exception, match="frozen"):
        cfg.optim.learning_rate = 1.0
    with pytest.raises(AttributeError):
        cfg.optim = OptimSection()  # type: ignore[misc]


def test_places_and_origins(write: Write) -> None:
    cfg = load_config(write(BASE + "flash_attention: true\n"), [("lora_r", "8", "--lora-r")])
    assert str(cfg.place("datasets[0].path")) == "c.yml:2:19"
    assert str(cfg.place("datasets[0].split")) == "c.yml:2:12"
    assert str(cfg.place("learning_rate")) == "c.yml:3:16"
    assert str(cfg.place("seed")) == "c.yml"
    assert [cfg.origin(k).kind for k in ("learning_rate", "lora_r", "seed")] == [
        "file",
        "override",
        "default",
    ]
    assert str(cfg.origin("lora_r")) == "--lora-r"
    assert cfg.is_set("attn_implementation")
    assert not cfg.is_set("seed")


# Several sources


def test_files_are_merged_from_left_to_right(write: Write) -> None:
    first = write(
        BASE + "lora_r: 8\nspecial_tokens: {bos_token: a, eos_token: b}\nflash_attention: true\n", "a.yml"
    )
    second = write(
        "lora_r: 16\nspecial_tokens: {eos_token: c}\nattn_implementation: sdpa\ndatasets: [{path: b}]\n",
        "b.yml",
    )
    cfg = load_config([first, second])
    assert cfg.adapter.lora_r == 16
    assert cfg.model.special_tokens is not None
    assert (cfg.model.special_tokens.bos_token, cfg.model.special_tokens.eos_token) == ("a", "c")
    assert cfg.model.attn_implementation == "sdpa"
    assert [entry.path for entry in cfg.data.datasets] == ["b"]
    assert str(cfg.place("lora_r")) == "b.yml:1:9"
    assert str(cfg.place("special_tokens.bos_token")).startswith("a.yml:5")
    assert cfg.sources == (first, second)


def test_a_later_null_unsets(write: Write) -> None:
    cfg = load_config([write(BASE + "lora_r: 8\n", "a.yml"), write("lora_r:\n", "b.yml")])
    assert cfg.adapter.lora_r is None


def test_overrides_come_last(write: Write) -> None:
    file = write(BASE + "sample_packing: true\nflash_attention: true\n")
    pairs = [
        ("learning_rate", "2e-5"),
        ("sample_packing", "false"),
        ("datasets[0].path", "b.jsonl"),
        ("datasets.1.path", "c.jsonl"),
        ("special_tokens.pad_token", "<pad>"),
        ("lora_target_modules", "[q_proj, v_proj]"),
        ("wandb_name", "2024-05-01: run"),
        ("flash_attention", "false"),
    ]
    cfg = load_config(file, pairs)
    assert (cfg.optim.learning_rate, cfg.data.sample_packing) == (2e-5, False)
    assert [(e.path, e.type) for e in cfg.data.datasets] == [("b.jsonl", "alpaca"), ("c.jsonl", None)]
    assert cfg.model.special_tokens is not None
    assert cfg.model.special_tokens.pad_token == "<pad>"
    assert cfg.adapter.lora_target_modules == ["q_proj", "v_proj"]
    assert cfg.tracking.wandb_name == "2024-05-01: run"
    assert cfg.model.attn_implementation is None


def test_overrides_as_a_mapping_of_python_values(write: Write) -> None:
    cfg = load_config(write(BASE), {"lora_r": 8, "datasets": [{"path": "p"}], "seed": None})
    assert (cfg.adapter.lora_r, cfg.data.datasets[0].path) == (8, "p")
    assert cfg.origin("lora_r").kind == "override"


def test_a_problem_of_an_override_is_told_with_the_flag(write: Write) -> None:
    problem = one(write(BASE), [("lora_rnk", "8", "--lora-rnk")])
    assert (problem.kind, problem.keys, str(problem.places[0])) == (
        "unknown_key",
        ("lora_rnk",),
        "--lora-rnk",
    )
    assert "`--lora-rnk`" in problem.message
    assert problem.remedy == "Did you mean `--lora-r`?"
    problem = one(write(BASE), [("datasets[0].pth", "x", "--datasets[0].pth")])
    assert problem.remedy == "Did you mean `--datasets[0].path`?"
    assert one(write(BASE), [("datasets[7].path", "x")]).kind == "invalid_value"
    assert one(write(BASE), [("lora_r.x", "1")]).kind == "invalid_value"
    assert one(write(BASE), [("lora_target_modules", "[a")]).kind == "syntax"
    assert one(write(BASE), [("lora_r", "", "--lora-r", "`--lora-r` needs a value.")]).kind == "syntax"


# The environment


def test_variables_in_names_and_paths(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    text = "base_model: ${WHERE}/m\ndatasets: [{path: '${WHERE}/a'}]\noutput_dir: ${NOT_SET_HERE:-out}/x\nlearning_rate: 1\n"
    cfg = load_config(write(text + "default_system_message: costs ${WHERE}\n"))
    assert (cfg.model.base_model, cfg.data.datasets[0].path, cfg.output.output_dir) == (
        "/data/m",
        "/data/a",
        "out/x",
    )
    assert cfg.data.default_system_message == "costs ${WHERE}"


def test_a_variable_that_is_not_set_is_told(write: Write) -> None:
    problem = one(write("base_model: ${NOT_SET_HERE}/m\ndatasets: [{path: a}]\nlearning_rate: 1\n"))
    assert (problem.keys, str(problem.places[0])) == (("base_model",), "c.yml:1:13")
    assert "`NOT_SET_HERE`" in problem.message


# Problems


@pytest.mark.parametrize(
    ("line", "kind", "column", "message", "remedy"),
    [
        ("lora_rank: 8", "unknown_key", 1, "`lora_rank`", "`lora_r`"),
        ("micro_batchsize: 2", "unknown_key", 1, "`micro_batchsize`", "`micro_batch_size`"),
        ("type: alpaca", "unknown_key", 1, "`type`", "inside `datasets[]`"),
        ("beta: 0.1", "unknown_key", 1, "`beta`", "`trl`"),
        ("max_seq_length: 8", "unknown_key", 1, "`max_seq_length`", "`sequence_len`"),
        ("learning_rat: 8", "unknown_key", 1, "`learning_rat`", "`learning_rate`"),
        ("xyzzyxyzzy: 8", "unknown_key", 1, "`xyzzyxyzzy`", "axolotl explain"),
        ("sequence_len: -5", "invalid_value", 15, "whole number above 0", "sequence_len: 2048"),
        ("micro_batch_size: 0", "invalid_value", 19, "whole number above 0", ""),
        ("micro_batch_size: 1.5", "invalid_value", 19, "`1.5`", ""),
        ("lora_r: -4", "invalid_value", 9, "`-4`", "lora_r: 16"),
        ("lora_r: true", "invalid_value", 9, "`true`", ""),
        ("lora_dropout: 1.5", "invalid_value", 15, "from 0 to 1", ""),
        ("num_epochs: 3x", "invalid_value", 13, "`3x`", ""),
        ("num_epochs: .nan", "invalid_value", 13, "`.nan`", ""),
        ("bf16: maybe", "invalid_value", 7, "`auto`", ""),
        ("save_strategy: step", "invalid_value", 16, "`steps`", "`steps`"),
        ("sample_packing: perhaps", "invalid_value", 17, "true or false", "sample_packing: true"),
        ("special_tokens: [a]", "invalid_value", 17, "a list", ""),
        ("special_tokens: {pad: x}", "unknown_key", 18, "`pad`", "`pad_token`"),
        ("lora_target_modules: {a: b}", "invalid_value", 22, "text or a list of texts", "q_proj"),
        ("lora_target_modules: [[a]]", "invalid_value", 23, "lora_target_modules[0]", ""),
        ("test_datasets: a.jsonl", "invalid_value", 16, "list", "- path:"),
        ("test_datasets: [{path: x, lora_r: 3}]", "unknown_key", 27, "`lora_r`", "top level"),
        ("test_datasets: [{path: x, tpye: 3}]", "unknown_key", 27, "`tpye`", "`type`"),
        (
            "test_datasets: [{path: x, field_output: 3}]",
            "unknown_key",
            27,
            "`field_output`",
            "`test_datasets[].type`",
        ),
        ("test_datasets: [{path: x, train_on_eos: trun}]", "invalid_value", 41, "`trun`", "`turn`"),
        ("test_datasets: [{path: x, type: {formt: y}}]", "unknown_key", 34, "`formt`", "`format`"),
        ("test_datasets: [{path: x, type: {format: [y]}}]", "invalid_value", 42, "type.format", ""),
        ("lr_groups: [{name: a, lr: 1}]", "missing", 13, "lr_groups[0].modules", ""),
        (
            "fsdp_config: {transformer_layer: X}",
            "unknown_key",
            15,
            "`transformer_layer`",
            "transformer_layer_cls_to_wrap",
        ),
        ("resume_from_checkpoint: [a]", "invalid_value", 25, "a list", "auto_resume_from_checkpoints"),
        ("rl: dpo", "unavailable", 1, "preference tuning", ""),
        ("datasets: []", "duplicate_key", 1, "line 2", ""),
        ("rope_scaling: {type: x}", "removed", 1, "`rope_scaling`", "overrides_of_model_config"),
    ],
)
def test_a_mistake_is_told_with_place_and_remedy(
    write: Write, line: str, kind: str, column: int, message: str, remedy: str
) -> None:
    problem = one(write(BASE + "val_set_size: 0\n" + line + "\n"))
    assert (problem.kind, str(problem.places[0])) == (kind, f"c.yml:5:{column}")
    assert message in problem.message
    assert remedy in problem.remedy
    assert problem.remedy
    shown, caret = problem.excerpt.splitlines()
    assert shown.endswith(line)
    assert caret.index("^") == shown.index(line) + column - 1


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    problems = told(
        write(
            "lora_rank: 8\nsequence_len: -5\nwarmup_steps: 3\nwarmup_ratio: 0.1\nlearning_rate: abc\nevals_per_epoch: 1\n"
        )
    )
    assert [p.kind for p in problems] == [
        "unknown_key",
        "invalid_value",
        "conflict",
        "invalid_value",
        "missing",
        "missing",
        "warning",
    ]
    assert [p.places[0].line for p in problems] == [1, 2, 3, 5, None, None, 6]


def test_a_wrong_value_is_not_also_told_as_missing(write: Write) -> None:
    problems = told(write("base_model: [x]\ndatasets: x\nlearning_rate: abc\n"))
    assert [p.kind for p in problems] == ["invalid_value"] * 3


def test_old_keys_of_a_block_that_is_not_built_are_not_told_one_by_one(write: Write) -> None:
    text = BASE + "trl: {vllm_gpu_memory_share: 0.3, num_generatoins: 4}\nrl: grpo\n"
    found = [(p.kind, p.keys[0]) for p in told(write(text))]
    assert sorted(found) == [
        ("unavailable", "rl"),
        ("unavailable", "trl"),
        ("unknown_key", "trl.num_generatoins"),
    ]


def test_an_unknown_key_without_a_value_is_a_warning(write: Write) -> None:
    cfg = load_config(write(BASE + "some_old_key:\n"))
    assert [(w.kind, w.keys) for w in cfg.warnings] == [("warning", ("some_old_key",))]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("random_init: true", "Did you mean `reinit_weights`?"),
        ("dataset_proceses: 4", "Did you mean `dataset_num_proc`?"),
        ("processing_class: AutoTokenizer", "Did you mean `tokenizer_type`?"),
        ("tokenizer_path: ./here", "Did you mean `tokenizer_config`?"),
        ("use_dora: true", "Did you mean `peft_use_dora`?"),
        ("torch_dtype: bfloat16", "Did you mean `bf16`?"),
        (
            "test_datasets: [{path: a, prompt_format: b}]",
            "`prompt_format` belongs inside `test_datasets[].type`.",
        ),
    ],
)
def test_an_unknown_key_leads_to_the_one_of_today(write: Write, text: str, remedy: str) -> None:
    assert remedy in [problem.remedy for problem in told(write(BASE + text + "\n"))]


def test_thousands_of_unknown_keys_do_not_take_long(write: Write) -> None:
    assert len(told(write(BASE + "".join(f"some_key_{i}: 1\n" for i in range(3000))))) == 3000


@pytest.mark.parametrize("name", ["missing.yml", ".", "/dev/null/x.yml", "a\0b"])
def test_a_file_that_is_not_there(write: Write, name: str) -> None:
    problem = one(name)
    assert problem.kind in ("path", "syntax")
    assert problem.remedy


def test_the_neighbours_of_a_missing_file_are_named(write: Write) -> None:
    write(BASE, "near.yml")
    assert "near.yml" in one("neer.yml").remedy


def test_checks_of_others_are_told_with_the_rest(write: Write) -> None:
    def check(cfg: Config) -> list[Problem]:
        return [cfg.problem("no", "do", "seed"), cfg.problem("not told", "", "lora_r")]

    problems = told(write(BASE + "seed: 3\nlora_r: x\n"), checks=[check])
    assert problems[0].message == "no"
    assert len(problems) == 2
    assert str(problems[0].places[0]) == "c.yml:4:7"


def test_what_a_command_does_not_need_is_not_missing(write: Write) -> None:
    assert {p.keys[0] for p in told(write("base_model: x\n"))} == {"datasets", "learning_rate"}
    assert load_config(write("base_model: x\nload_in_4bit: true\n"), verb="inference").model.load_in_4bit
    assert [p.keys[0] for p in told(write("seed: 1\n"), verb="inference")] == ["base_model"]


# What is saved


def test_the_resolved_config_repeats_the_run(write: Write) -> None:
    text = BASE + "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
    text += "flash_attention: true\nsample_packing: true\nval_set_size: 0.1\nevals_per_epoch: 2\nfsdp_config: {fsdp_offload_params: true}\n"
    text += "special_tokens: {pad_token: <|end|>}\nadded_tokens_overrides: {3: a}\ngradient_checkpointing: offload\n"
    cfg, _ = resolve(load_config(write(text)), Hardware(device="cuda", bf16=True, tf32=True, cpus=4))
    again = load_config(write(cfg.resolved_yaml(), "resolved.yml"))
    assert not [w for w in again.warnings if "resolved" in str(w)]
    assert again.effective() == cfg.effective()
    assert resolve(again, Hardware(cpus=1))[1] == []


def test_secrets_are_neither_saved_nor_shown(write: Write) -> None:
    secret = "hf_" + "a" * 34
    text = BASE.replace("a.jsonl", "https://me:pass-word@host/a.jsonl") + "comet_api_key: key-of-mine\n"
    text += (
        "deepspeed: {hf_token: t0ken, stage: 2, wandb: {api_key: t1ken}}\n" + f"wandb_name: run {secret}\n"
    )
    cfg = load_config(write(text))
    saved = cfg.resolved_yaml()
    for word in ("key-of-mine", "pass-word", "t0ken", "t1ken", secret):
        assert word not in saved
    assert "key-of-mine" not in repr(cfg.tracking)
    assert yaml.safe_load(saved)["deepspeed"] == {"stage": 2, "wandb": {}}
    assert cfg.tracking.comet_api_key == "key-of-mine"


def test_secrets_do_not_stand_in_messages(write: Write) -> None:
    text = BASE + "comet_api_key: [key-of-mine]\ncomet_api_key: other-key\nhf_tokn: {x: 1}\n"
    text += "deepspeed: {api_key: t0ken, stage: [1, 2]}\nhub_strategy: hf_" + "a" * 34 + "\n"
    shown = "".join(f"{p.message}{p.remedy}{p.excerpt}" for p in told(write(text)))
    for word in ("key-of-mine", "other-key", "t0ken", "hf_aaa"):
        assert word not in shown
    assert "comet_api_key: ****" in shown


def test_special_tokens_are_no_secrets(write: Write) -> None:
    cfg = load_config(
        write(BASE + "special_tokens: {pad_token: p, eos_token: e}\neot_tokens: [x]\ntokens: [y]\n")
    )
    saved = yaml.safe_load(cfg.resolved_yaml())
    assert saved["special_tokens"] == {"pad_token": "p", "eos_token": "e"}
    assert (saved["eot_tokens"], saved["tokens"]) == (["x"], ["y"])


# From elsewhere


@pytest.fixture
def server() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/c.yml"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(BASE.encode() + b"lora_rnk: 1\n" if found else b"")

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_config_from_an_address(server: str) -> None:
    problem = one(f"{server}/c.yml")
    assert str(problem.places[0]) == f"{server}/c.yml:4:1"
    assert "404" in one(f"{server}/other.yml").message


def test_addresses_that_cannot_be_read() -> None:
    assert "https" in one("http://example.com/c.yml").message
    assert "cannot be read" in one("https://127.0.0.1:1/c.yml").message
    assert "hf://owner/repo/file.yml" in one("hf://owner/repo").message


def test_a_config_from_the_hub(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        if name == "gone.yml":
            raise OSError("404 not found")
        return str(write(BASE, "downloaded.yml"))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_config("hf://me/configs@v1/sub/c.yml").model.base_model == "x"
    assert asked == [("me/configs", "sub/c.yml", "v1")]
    assert "404" in one("hf://me/configs/gone.yml").message


def test_a_config_knows_the_words_that_name_it_again(tmp_path: Path) -> None:
    file = tmp_path / "a b.yml"
    file.write_text(
        "base_model: m\ndatasets:\n  - path: rows.jsonl\n    type: alpaca\nlearning_rate: 1.0e-4\n"
    )
    given = [
        ("output_dir", "out"),
        ("datasets[0].split", "train[:5]"),
        ("wandb_project", "p"),
        ("comet_api_key", "very-secret"),
        ("auto_resume_from_checkpoints", "true"),
    ]
    cfg = load_config(file, given)
    flags = ["--output-dir", "out", "--datasets[0].split", "train[:5]", "--wandb-project", "p"]
    assert cfg.words("auto_resume_from_checkpoints") == [str(file), *flags]
    assert cfg.words(of=("model", "data")) == [str(file), "--datasets[0].split", "train[:5]"]
    again = load_config(file, parse_overrides(cfg.words()[1:]))
    assert again.output.output_dir == "out" and again.train.auto_resume_from_checkpoints
    assert load_config(file).words() == [str(file)]


@pytest.mark.parametrize(
    "address",
    [
        "https://h/a.jsonl?token=sekret&x=1",
        "https://u:sekret@h/a.jsonl",
        "https://b.s3.amazonaws.com/a?X-Amz-Credential=sekret&X-Amz-Signature=sekret",
        "https://h/a?sv=2020&sig=sekret",
        "https://h/a?access_key=sekret#x",
    ],
)
def test_what_opens_an_address_is_not_kept(write: Write, address: str) -> None:
    file = write(BASE.replace("a.jsonl", f'"{address}"'))
    cfg = load_config(file)
    assert cfg.data.datasets[0].path == address
    assert "sekret" not in cfg.resolved_yaml()
    assert "sekret" not in masked(f"path: {address}")
    assert len(masked(f"path: {address}")) == len(f"path: {address}")
    with pytest.raises(ConfigError) as caught:
        load_config(address)
    assert "sekret" not in str(caught.value)


def _told(folder: Path, text: str) -> list[Problem]:
    base = ["base_model: x", "learning_rate: 1e-4", "datasets: [{path: a, type: alpaca}]"]
    (folder / "c.yml").write_text("\n".join([*base, text]) + "\n", encoding="utf-8")
    try:
        return list(load_config(folder / "c.yml").warnings)
    except ConfigError as error:
        return list(error.problems)


@pytest.mark.parametrize("off", ["0", "null", "false"])
def test_an_old_name_that_is_off_yields_to_the_new_one(tmp_path: Path, off: str) -> None:
    assert _told(tmp_path, f"noisy_embedding_alpha: {off}\nneftune_noise_alpha: 5") == []
    [problem] = _told(tmp_path, "noisy_embedding_alpha: 4\nneftune_noise_alpha: 5")
    assert problem.kind == "conflict"


def test_options_at_their_defaults_ask_for_nothing(tmp_path: Path) -> None:
    assert _told(tmp_path, "trl: {use_vllm: false, vllm_server_port: 8000}\nvllm: {port: 8000}") == []
    [problem] = _told(tmp_path, "trl: {use_vllm: true}")
    assert problem.kind == "unavailable"
    [problem] = _told(tmp_path, "qat: {weight_dtype: int8}")
    assert problem.kind == "unavailable"


def test_an_empty_variable_that_leaves_a_default_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    [problem] = _told(tmp_path, "output_dir: ${NO_SUCH_FOLDER:-}")
    assert (problem.kind, problem.keys) == ("warning", ("output_dir",))
    assert "`./model-out`" in problem.message
    assert _told(tmp_path, "wandb_entity: ${NO_SUCH_FOLDER:-}") == []


@pytest.mark.parametrize("holder", ["x-base", ".base"])
def test_a_key_that_holds_an_anchor_is_no_key(tmp_path: Path, holder: str) -> None:
    assert _told(tmp_path, f"{holder}: &b {{bos_token: <s>}}\nspecial_tokens: *b") == []


def test_a_secret_of_a_tracker_belongs_to_the_environment(tmp_path: Path) -> None:
    [problem] = _told(tmp_path, "wandb_api_key: abcdef0123456789")
    assert "WANDB_API_KEY" in problem.remedy
    assert "abcdef" not in f"{problem} {problem.excerpt}"


def test_a_value_is_refused_in_the_words_of_its_field(tmp_path: Path) -> None:
    [problem] = _told(tmp_path, "max_time: soon")
    assert "`2h`" in problem.message
