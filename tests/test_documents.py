"""What the documents tell a reader to type: commands that exist, settings that are known, requests that are taken."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from serve.config import load_server_config
from serve.schema import Limits, parse_chat_request
from tests.documents import ROOT, find_blocks, find_commands
from tests.serving import ScriptedRouters, make_calibration, make_served, serving

DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = [(document, command) for document in DOCUMENTS for command in find_commands(document)]
SERVER = "http://127.0.0.1:8000"


def read_curl(command: str) -> tuple[str, dict[str, str], str]:
    """URL, headers and body of a curl command as these documents write it."""
    words = shlex.split(command)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    return words[1], headers, words[words.index("-d") + 1]


def check_make(command: str) -> None:
    words = shlex.split(command)
    shown = subprocess.run(["make", "-nB", *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "python -m" in shown.stdout, (command, shown.stderr)
    arguments = dict(word.split("=", 1) for word in words[2:]).get("ARGS", "")
    if words[1] == "serve":
        load_server_config(overrides=shlex.split(arguments))


def check_module(command: str) -> None:
    words = shlex.split(command)
    assert importlib.util.find_spec(words[2]) is not None, command
    if words[2] == "serve":
        load_server_config(overrides=words[3:])


def check_curl(command: str) -> None:
    url, headers, body = read_curl(command)
    assert url.startswith(SERVER + "/v1/"), command
    if "temprature" in body:  # shows an error
        return
    parse_chat_request(body.encode(), headers, Limits())


# Options that Ray 2.60 takes and its help leaves out; tests/fake_cluster.py starts nodes with it.
HIDDEN = ("--labels",)


def check_ray(command: str) -> None:
    """A subcommand of `ray`, `serve` or `hf` with options that it has, and files that are there."""
    every = shlex.split(command)
    words = every[: every.index("--")] if "--" in every else every
    shown = show_help(words[0], *(words[1:3] if words[1] == "job" else words[1:2]))
    for word in words[2:]:
        if word.startswith("--") and word.partition("=")[0] not in HIDDEN:
            assert word.partition("=")[0] in shown, f"{command}: no option {word}"
    check_files(command)


@functools.cache
def show_help(program: str, *below: str) -> str:
    command = [str(Path(sys.executable).parent / program), *below, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0, (command, shown.stderr)
    return shown.stdout


def check_files(command: str) -> None:
    """The files that a command names are there, but for those that it or an earlier one makes."""
    for word in shlex.split(command):
        name = word.removeprefix("file://")
        if re.fullmatch(r"[\w./-]+\.(yaml|json)", name) and not name.startswith("/"):
            assert (ROOT / name).is_file(), command


def check_nothing(command: str) -> None:
    """Of the shell itself, and tried with the walk-through that it belongs to (test_cluster_doc)."""


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d}:{c[:40]}" for d, c in COMMANDS])
def test_a_printed_command_can_be_typed(document: str, command: str) -> None:
    kinds = {"make": check_make, "curl": check_curl, "ray": check_ray, "serve": check_ray, "hf": check_ray}
    kinds |= dict.fromkeys(("aws", "kubectl", "helm", "docker", "sed"), check_files)  # not installed where this runs
    kinds |= dict.fromkeys(("kill", "rm", "source"), check_nothing)
    first = command.split()[0]
    if first == "python":
        check_module(command)
    elif first == "export":
        assert re.fullmatch(r'export [A-Z_]+=([\w:/.]+|"\$\(.+\)")', command)
    else:
        kinds[first](command)


def test_serving_is_told_in_the_readme_and_in_full() -> None:
    assert {"README.md", "docs/serving.md", "docs/security.md"} <= {document for document, _ in COMMANDS}
    assert "make serve" in find_commands("README.md")
    assert sum(command.startswith("curl") for _, command in COMMANDS) >= 4


@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_the_snippet_for_openais_client_runs_as_printed(document: str) -> None:
    served = make_served(routers=ScriptedRouters(calibration=make_calibration()))
    snippets = [block for block in find_blocks(document, "python") if "from openai import OpenAI" in block]
    assert snippets
    for snippet in snippets:
        assert f'base_url="{SERVER}/v1"' in snippet
        with serving(served) as url:
            program = snippet.replace(SERVER, url).replace("0.3}", "0.45}")  # what the scripted calibration has
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "A: note 0" in done.stdout and "Answer: 42" in done.stdout and "'small': 2" in done.stdout
        assert ("[large 0.90] B: note 1" in done.stdout) == ("stream=True" in snippet)


def test_the_printed_requests_are_answered_as_printed() -> None:
    served = make_served(routers=ScriptedRouters(calibration=make_calibration()))
    with serving(served) as url:
        for _, command in COMMANDS:
            if not command.startswith("curl"):
                continue
            where, headers, body = read_curl(command)
            headers = {name: value.replace("0.01", "0.02") for name, value in headers.items()}
            response = httpx.post(where.replace(SERVER, url), headers=headers, content=body)
            assert response.status_code == (400 if "temprature" in body else 200), response.text
            if response.status_code == 400:
                printed = [json.loads(block) for block in find_blocks("docs/serving.md", "json")]
                assert response.json() in printed


def test_the_printed_answer_has_the_fields_that_an_answer_has() -> None:
    served = make_served()
    with serving(served) as url:
        body = {"model": "auto", "messages": [{"role": "user", "content": "Say q."}]}
        real = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    printed = json.loads(find_blocks("docs/serving.md", "json")[0])
    assert set(printed) == set(real) and set(printed["routing"]) == set(real["routing"])
    assert set(printed["usage"]) == set(real["usage"])
    assert printed["routing"]["flops_saved"] == printed["routing"]["flops_large_only"] - printed["routing"]["flops"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_that_are_there(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).is_file(), f"{document} links to {target}"


def test_printed_yaml_is_what_it_says() -> None:
    swap = yaml.safe_load(find_blocks("docs/serving.md", "yaml")[0])
    (entry,) = swap["deployments"]
    assert entry["name"] == "router" and len(entry["user_config"]["routers"]) == 2
    policy = yaml.safe_load(find_blocks("docs/security.md", "yaml")[0])
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
