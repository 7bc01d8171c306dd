"""Uploads weights to the Hub: what is finished, and checkpoints while a run goes on. A Hub that is down costs no run."""

from __future__ import annotations

import glob
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars
from transformers.dynamic_module_utils import get_relative_import_files

from axolotl.config.output import OutputSection
from axolotl.console import note, success, warn
from axolotl.errors import EnvironmentProblem, ModelError, Problem
from axolotl.model.files import TOKENIZER_FILES, read_json

WAITS = (5.0, 20.0, 60.0)
"""Seconds before each further try."""
_MODEL = ("model*.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_model*.safetensors", "adapter_config.json")
_BESIDE = (
    "config.json",
    "generation_config.json",
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "axolotl_config.yml",
    "README.md",
)


def files_to_publish(folder: Path) -> list[str]:
    """The files of a finished model or adapter, relative to `folder`. All else stays here: checkpoints, logs, merged/.

    Raises ModelError where `folder` holds no weights.
    """
    weights = _found(folder, (*_MODEL, *_ADAPTER))
    if not any(name.endswith(".safetensors") for name in weights):
        raise ModelError(
            Problem(
                f"`{folder}` holds no finished weights to upload.",
                "Train first, or name the folder that holds them with `--folder`.",
                "model",
                ("output_dir",),
            )
        )
    return [*weights, *_found(folder, _BESIDE), *_own_code(folder)]


def _found(folder: Path, patterns: Sequence[str]) -> list[str]:
    root = glob.escape(str(folder))
    paths = (path for p in patterns for path in sorted(glob.glob(os.path.join(root, p))))
    return [str(Path(path).relative_to(folder)) for path in paths if os.path.isfile(path)]


def _own_code(folder: Path) -> list[str]:
    """Python files that the model's or tokenizer's `auto_map` names, and those that they import."""
    found: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        entries = (read_json(path).get("auto_map") or {}) if path.is_file() else {}
        for entry in entries.values():
            for each in entry if isinstance(entry, list | tuple) else (entry,):
                # `repository--module.Class` stands for code that stays in its own repository.
                file = folder / f"{str(each).rpartition('.')[0]}.py"
                if each and "--" not in str(each) and file.is_file():
                    found |= {file.name, *(Path(p).name for p in get_relative_import_files(str(file)))}
    return sorted(found)


def open_repository(output: OutputSection) -> None:
    """Makes the repository (private) and the branch, unless they are there: what a token may not do shows here.

    Raises EnvironmentProblem for whatever the Hub or the network refuses.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(str(output.hub_model_id), private=True, exist_ok=True)
        if output.hub_revision and output.hub_revision != "main":
            api.create_branch(str(output.hub_model_id), branch=output.hub_revision, exist_ok=True)
    except Exception as error:
        raise EnvironmentProblem(
            Problem(
                f"`hub_model_id: {output.hub_model_id}` cannot be written to: {_reason(error)}.",
                "Check the name and that the token may write (hf auth login), or delete the line and upload later: "
                "axolotl publish config.yml",
                "environment",
                ("hub_model_id",),
            )
        ) from error


def publish(folder: Path, output: OutputSection, *, waits: Sequence[float] = WAITS) -> str:
    """Uploads a finished folder to `hub_model_id` as one change, and returns its address. Weights there that are not
    among the new ones, and would be loaded with them, are removed (the repository's history keeps them).

    What the Hub has already is not sent again, so that a repeated call goes on with one that was broken off.
    Raises ModelError for a folder without weights, EnvironmentProblem where the last try failed.
    """
    names = files_to_publish(folder)
    stale = _MODEL if any(n.startswith("model") for n in names) else _ADAPTER
    for number in range(len(waits) + 1):
        try:
            open_repository(output)
            _upload(folder, output, names, "Finished weights", stale=stale)
            break
        except Exception as error:
            if number == len(waits) or not _may_pass(error):
                if isinstance(error, EnvironmentProblem):
                    raise
                raise EnvironmentProblem(
                    Problem(
                        f"`{folder}` could not be uploaded to `{output.hub_model_id}`: {_reason(error)}.",
                        "Run the same command again: it goes on where this one ended.",
                        "environment",
                        ("hub_model_id",),
                    )
                ) from error
            warn(f"The upload failed: {_reason(error)}. The next try is in {waits[number]:.0f} seconds.")
            time.sleep(waits[number])
    at = f"/tree/{output.hub_revision}" if output.hub_revision else ""
    return f"{huggingface_hub.constants.ENDPOINT}/{output.hub_model_id}{at}"


def publish_or_tell(folder: Path, output: OutputSection, command: str) -> bool:
    """Uploads at the end of a run; a failure is a warning with the command that uploads later. True if uploaded."""
    note(f"Uploading to {output.hub_model_id} …")
    try:
        success(f"Uploaded: {publish(folder, output)}")
    except (EnvironmentProblem, ModelError) as error:
        warn(f"{error.problems[0].message} The weights are safe in {folder}. To upload later:\n  {command}")
        return False
    return True


def _upload(
    folder: Path,
    output: OutputSection,
    names: Sequence[str] | None,
    message: str,
    *,
    into: str | None = None,
    stale: Sequence[str] = (),
) -> None:
    huggingface_hub.HfApi().upload_folder(
        repo_id=str(output.hub_model_id),
        folder_path=folder,
        path_in_repo=into,
        commit_message=message,
        revision=output.hub_revision,
        allow_patterns=None if names is None else [glob.escape(name) for name in names],
        delete_patterns=list(stale) or None,
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, EnvironmentProblem):
        return error.problems[0].message.rstrip(".")
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _may_pass(error: BaseException) -> bool:
    """Whether another try makes sense: not for what the Hub refused on purpose."""
    cause = error.__cause__ if isinstance(error, EnvironmentProblem) else error
    if isinstance(cause, HfHubHTTPError):
        status = getattr(cause.response, "status_code", None)
        return status is None or status >= 500 or status in (408, 409, 412, 429)
    return not isinstance(cause, ValueError | TypeError)


class Uploads:
    """Uploads checkpoints in a thread while training goes on; a failure is told, and the next checkpoint tried anew.

    `hub_strategy: end` uploads none of them, `every_save` the weights, `checkpoint` also all that it takes to resume
    (as last-checkpoint/), `all_checkpoints` that of every checkpoint under its own name.
    """

    def __init__(self, output: OutputSection, tell: Callable[[str], None] = warn) -> None:
        self.output, self.tell = output, tell
        self.strategy = output.hub_strategy or "every_save"
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: Future[None] | None = None

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint stands in its folder. Its files are linked aside, since rotation may remove it meanwhile."""
        if self.strategy == "end":
            return
        if self._pool is None:
            disable_progress_bars()
            self._pool = ThreadPoolExecutor(1, "upload")
        if self._waiting is not None and self.strategy != "all_checkpoints":
            # Of checkpoints that wait for a slow connection only the newest matters.
            self._waiting.cancel()
        aside = checkpoint.with_name(f".tmp-upload-{checkpoint.name}")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            # PEFT's card names a base in a folder of this machine, which the Hub refuses.
            shutil.copytree(
                checkpoint, aside, copy_function=_link, ignore=shutil.ignore_patterns("README.md")
            )
        except OSError as error:
            self.tell(f"{checkpoint.name} is not uploaded: {error.strerror or error}.")
            return
        self._waiting = self._pool.submit(self._send, aside, checkpoint.name)
        self._waiting.add_done_callback(lambda _: shutil.rmtree(aside, ignore_errors=True))

    def _send(self, aside: Path, name: str) -> None:
        try:
            for names, into in self._parts(aside, name):
                _upload(aside, self.output, names, f"Training in progress: {name}", into=into)
        except Exception as error:
            self.tell(f"{name} could not be uploaded: {_reason(error)}. Training goes on.")

    def _parts(self, aside: Path, name: str) -> Iterator[tuple[list[str] | None, str | None]]:
        yield files_to_publish(aside), None
        if self.strategy == "checkpoint":
            yield None, "last-checkpoint"
        if self.strategy == "all_checkpoints":
            yield None, name

    def close(self) -> None:
        """Waits for the uploads that run or wait."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
