"""The Dockerfile's rules, and the snippets of docs/clusters.md and docs/containers.md: every option they name exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from axolotl.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
CLUSTERS = (ROOT / "docs" / "clusters.md").read_text()
CONTAINERS = (ROOT / "docs" / "containers.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments; comments left out, continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def snippet(page: str, name: str) -> str:
    match = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- /{name} -->", page, re.DOTALL)
    assert match, name
    return match[1]


def test_the_image_is_pinned_and_runs_without_privileges() -> None:
    arguments = dict(each.split("=", 1) for each in of("ARG"))
    (base,) = of("FROM")
    base = arguments[base.strip("${}")] if base.startswith("$") else base
    tag = base.rpartition(":")[2]
    assert re.search(r"\d+\.\d+\.\d+", tag) and "latest" not in tag
    (user,) = of("USER")
    assert arguments[user.strip("${}")].isdigit() and int(arguments[user.strip("${}")]) >= 1000
    # Whatever runs at run time or is installed after the packages runs as this user.
    names = [name for name, _ in instructions()]
    assert names.index("USER") < names.index("COPY") < names.index("ENTRYPOINT")
    assert names.count("ENTRYPOINT") == names.count("CMD") == 1
    assert yaml.safe_load(of("ENTRYPOINT")[0])[-1] == "axolotl"


def test_nothing_is_left_of_what_installing_needs() -> None:
    for run in of("RUN"):
        if "apt-get" in run:
            assert "apt-get update" in run and "rm -rf /var/lib/apt/lists/*" in run
            assert "--no-install-recommends" in run and "sudo" not in run and "apt-get upgrade" not in run
    assert "PIP_NO_CACHE_DIR=1" in DOCKERFILE
    assert not of("ADD")
    assert "-c constraints.txt -c extras.txt" in DOCKERFILE


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert ignore[0] == "*"
    for copy in of("COPY"):
        *sources, _ = [word for word in copy.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source
    # What the package's own build reads has to be there as well.
    project = (ROOT / "pyproject.toml").read_text()
    for needed in re.findall(r'(?:readme|license-files) = \[?"([^"]+)"', project):
        assert f"!{needed}" in ignore


def test_the_extras_exist_and_constraints_become_what_pip_takes() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (extras,) = [each.split("=", 1)[1] for each in of("ARG") if each.startswith("EXTRAS=")]
    for extra in extras.split(","):
        assert re.search(rf"^{re.escape(extra)} = \[", project, re.MULTILINE), extra
    program = re.search(r"sed (-e .*?) constraints-extras\.txt > extras\.txt", DOCKERFILE)
    assert program
    done = subprocess.run(
        ["sed", *shlex.split(program[1]), str(ROOT / "constraints-extras.txt")],
        capture_output=True,
        text=True,
        check=True,
    )
    pins = [line for line in done.stdout.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+", pin) for pin in pins)
    assert not any(pin.startswith("triton==") for pin in pins)


@pytest.mark.extras
def test_hadolint_finds_nothing() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _torchrun_knows(words: list[str]) -> Any:
    parser = get_args_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, word
    return parser


def _train_knows(words: list[str]) -> None:
    from axolotl.config.keys import owners

    command = cli.get_command(None, "train")  # type: ignore[arg-type]
    assert command is not None
    own = {option for parameter in command.params for option in getattr(parameter, "opts", [])}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--"):
            assert name in own or name[2:].replace("-", "_") in owners(), word


def test_the_slurm_script_is_right(tmp_path: Path) -> None:
    text = snippet(CLUSTERS, "slurm")
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    (inner,) = re.findall(r"bash -c '(.*?)'", text, re.DOTALL)
    subprocess.run(["bash", "-n", "-c", inner], check=True)
    words = shlex.split(inner.replace("\\\n", " "))
    assert words[:3] == ["exec", "axolotl", "train"]
    at = words.index("--")
    _train_knows(words[3:at])
    _torchrun_knows(words[at + 1 :])
    # It has to end before Slurm's patience does.
    patience = int(re.search(r"--signal=TERM@(\d+)", text)[1])  # type: ignore[index]
    assert int(words[words.index("--shutdown-timeout") + 1]) < patience


def test_the_kubernetes_job_is_right() -> None:
    service, job = yaml.safe_load_all(snippet(CLUSTERS, "kubernetes"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    at = arguments.index("--")
    assert arguments[0] == "train"
    _train_knows(arguments[1:at])
    _torchrun_knows(arguments[at + 1 :])
    options = dict(word[2:].split("=", 1) for word in arguments[at + 1 :])
    # The name at which all meet is that of pod 0 in the service's domain; the port is the service's.
    host, _, port = options["rdzv-endpoint"].partition(":")
    assert (
        host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
        and pod["subdomain"] == service["metadata"]["name"]
    )
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed"
    assert int(options["nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # Policies about exit codes are taken only with pods that are never restarted.
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsUser"] == 10001


def test_docker_run_names_what_the_image_has(tmp_path: Path) -> None:
    text = snippet(CONTAINERS, "run")
    script = tmp_path / "run.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    words = shlex.split(text.replace("\\\n", " "))
    assert words[-3:] == ["axolotl", "train", "config.yml"]
    mounted = [word.rpartition(":")[2] for word in words if ":/" in word]
    (made,) = [run for run in of("RUN") if "mkdir" in run]
    for folder in mounted:
        assert folder in made, folder
    assert "--shm-size" in words and "--gpus" in words


@pytest.mark.parametrize("page", [CLUSTERS, CONTAINERS], ids=["clusters", "containers"])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page):
        assert (ROOT / "docs" / target).resolve().exists(), target
