"""A reference becomes a file: here, or on the Hub by its real client; or an exact error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashquant.config.locate import HubFile, locate, named_in, split_revision
from flashquant.errors import ConfigError, LocateError
from tests.support.hub import Hub, hub

CONFIG = b"configs: [{fn: int8, model: owner/w8a8@v1, profile: profile.pt}]"
REPOS = {
    "owner/repo": {
        "main": {"int8/flash.yaml": CONFIG, "int8/profile.pt": b"new" * 99},
        "v1": {"int8/profile.pt": b"old" * 99},
    },
    "owner/w8a8": {"v1": {"profile.pt": b"its own"}},
    "owner/plain": {"main": {"config.json": b"{}"}},
}

# Each line of standard input is a reference; each of the output, what became of it.
PROGRAM = """
import json, sys, time
time.sleep = lambda seconds: None  # the client asks again five times, after 23 seconds in all
from flashquant.config.schema import load_config
from flashquant.errors import ConfigError
from flashquant.config.locate import locate, locate_in_model
assert "huggingface_hub" not in sys.modules
for line in sys.stdin.read().splitlines():
    verb, reference = line.split(" ", 1)
    try:
        if verb == "file":
            path, pinned = locate(reference)
            answer = [path.read_bytes().decode(), pinned]
        elif verb == "model":
            found = locate_in_model(reference, "profile.pt")
            answer = found and [found.path.read_bytes().decode(), found.reference]
        else:
            config = load_config(reference)
            answer = [config.source, config.configs[0].model, config.configs[0].profile]
    except ConfigError as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
assert not {"torch", "vllm"} & set(sys.modules)
"""


def ask(at: Hub, home: Path, *lines: str, **environ: str) -> list:
    """What the real client makes of each reference, in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(lines),
        env=kept | {"HF_ENDPOINT": at.url, "HF_HOME": str(home), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# On the Hub.


def test_a_file_on_the_hub_is_downloaded_once_and_pinned_to_its_commit(tmp_path):
    with hub(REPOS) as at:
        main, v1 = at.commit("owner/repo", "main"), at.commit("owner/repo", "v1")

        answers = ask(
            at,
            tmp_path,
            "file owner/repo/int8/profile.pt",
            "file owner/repo/int8/profile.pt@v1",
            f"file owner/repo/int8/profile.pt@{v1}",
            "file owner/repo/int8/profile.pt",
        )

    assert answers == [
        ["new" * 99, f"owner/repo/int8/profile.pt@{main}"],
        ["old" * 99, f"owner/repo/int8/profile.pt@{v1}"],
        ["old" * 99, f"owner/repo/int8/profile.pt@{v1}"],
        ["new" * 99, f"owner/repo/int8/profile.pt@{main}"],
    ]
    fetched = [asked for asked in at.asked if asked.startswith("GET /owner/repo/")]
    assert len(fetched) == 2, fetched


def test_a_repository_that_was_renamed_is_found_under_its_old_name(tmp_path):
    with hub(REPOS, moved={"old/name": "owner/repo"}) as at:
        (answer,) = ask(at, tmp_path, "file old/name/int8/profile.pt@v1")

    assert answer[0] == "old" * 99


def test_what_is_cached_is_had_offline_and_what_is_not_is_an_error(tmp_path):
    with hub(REPOS) as at:
        ask(at, tmp_path, "file owner/repo/int8/profile.pt")
        asked = len(at.asked)

        cached, other = ask(
            at,
            tmp_path,
            "file owner/repo/int8/profile.pt",
            "file owner/repo/int8/profile.pt@v1",
            HF_HUB_OFFLINE="1",
        )

    assert cached[0] == "new" * 99
    assert "owner/repo/int8/profile.pt@v1 is not in the cache, while HF_HUB_OFFLINE is set" in other
    assert "`hf download owner/repo int8/profile.pt --revision v1`" in other
    assert len(at.asked) == asked


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("owner/nothing/profile.pt", "has no model repository owner/nothing"),
        ("owner/repo/profile.pt", "has no file 'profile.pt'"),
        ("owner/repo/int8/profile.pt@v9", "has no revision 'v9'"),
        ("owner/re--po/int8/profile.pt", "'owner/re--po' cannot be a repository on the Hub"),
    ],
)
def test_what_the_hub_has_not_is_said_exactly(tmp_path, reference, says):
    with hub(REPOS) as at:
        (answer,) = ask(at, tmp_path, f"file {reference}")

    assert answer.startswith(f"LocateError: there is no file {Path.cwd() / reference}, and ")
    assert says in answer


def test_a_file_that_arrives_in_part_is_an_error_and_is_not_kept(tmp_path):
    with hub(REPOS, cut=frozenset({"int8/profile.pt"})) as at:
        (cut,) = ask(at, tmp_path, "file owner/repo/int8/profile.pt")
        at.cut = frozenset()
        (whole,) = ask(at, tmp_path, "file owner/repo/int8/profile.pt")

    assert "could not be downloaded whole" in cut
    assert "should be of size 297" in cut
    assert whole[0] == "new" * 99


def test_a_hub_that_does_not_answer_is_an_error(tmp_path):
    nobody = Hub({}, url="http://127.0.0.1:9")

    (answer,) = ask(nobody, tmp_path, "file owner/repo/int8/profile.pt")

    assert "http://127.0.0.1:9 does not answer. Look at the connection" in answer


def test_a_configuration_on_the_hub_names_files_beside_it(tmp_path):
    with hub(REPOS) as at:
        main = at.commit("owner/repo", "main")
        answers = ask(
            at,
            tmp_path,
            "config owner/repo/int8/flash.yaml",
            f"file owner/repo/int8/profile.pt@{main}",
        )

    assert answers[0] == [
        f"owner/repo/int8/flash.yaml@{main}",
        "owner/w8a8@v1",
        f"owner/repo/int8/profile.pt@{main}",
    ]
    assert answers[1][0] == "new" * 99


def test_a_model_on_the_hub_may_bring_its_profile(tmp_path):
    with hub(REPOS) as at:
        own, none, absent = ask(
            at, tmp_path, "model owner/w8a8@v1", "model owner/plain", "model owner/nothing"
        )

    assert own[0] == "its own"
    assert none is None
    assert "has no model repository owner/nothing" in absent


# Here.


def test_what_is_here_is_never_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/repo").mkdir(parents=True)
    (tmp_path / "owner/repo/profile.pt").write_bytes(b"here")

    path, reference = locate("owner/repo/profile.pt")

    assert path.read_bytes() == b"here"
    assert reference == str(tmp_path / "owner/repo/profile.pt")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("", "is blank"),
        ("/no/such/file.pt", "there is no file /no/such/file.pt. Write a path"),
        ("profile.pt", "there is no file"),
        ("owner/repo/../../etc/passwd.pt", r"named on the Hub has no '\.\.' in it"),
        ("owner/repo//etc/passwd.pt", "named on the Hub has no '' in it"),
        ("owner/repo/a\\b.pt", r"named on the Hub has no 'a\\\\b.pt' in it"),
        ("../repo/profile.pt", "there is no file"),
        ("/", "is a folder"),
        (os.devnull, "not a regular file"),
        ("a\0b.pt", "there is no file"),
        ("x/" * 3000 + "y.pt", "there is no file"),
    ],
)
def test_a_reference_to_nothing_is_told_so_without_asking_the_hub(reference, says):
    with pytest.raises(LocateError, match=says):
        locate(reference)


@pytest.mark.parametrize(
    ("reference", "parsed"),
    [
        ("owner/repo/file.pt", HubFile("owner/repo", "file.pt")),
        ("owner/repo/a/b.yaml@main", HubFile("owner/repo", "a/b.yaml", "main")),
        ("owner/repo/file.pt@refs/pr/1", HubFile("owner/repo", "file.pt", "refs/pr/1")),
        ("owner/file.pt", None),
        ("owner/repo/file", None),
        ("/owner/repo/file.pt", None),
        ("owner/repo/../file.pt", None),
        ("./owner/repo/file.pt", None),
    ],
)
def test_the_form_of_a_reference_to_the_hub(reference, parsed):
    assert HubFile.parse(reference) == parsed


# Named in a file.


@pytest.fixture
def source(tmp_path) -> str:
    """Where a configuration lies; nothing is read from it here."""
    (tmp_path / "runs").mkdir()
    return str(tmp_path / "runs/flash.yaml")


def test_a_name_in_a_file_is_one_beside_it(source, tmp_path):
    (tmp_path / "runs/p.pt").touch()

    assert named_in(source, "p.pt") == str(tmp_path / "runs/p.pt")
    assert named_in(source, "./p.pt") == str(tmp_path / "runs/p.pt")


def test_or_where_the_process_was_started(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pt").touch()
    (tmp_path / "w8a8").mkdir()

    assert named_in(source, "p.pt") == str(tmp_path / "p.pt")
    assert named_in(source, "w8a8", folder=True) == str(tmp_path / "w8a8")


@pytest.mark.parametrize("reference", ["owner/repo/p.pt@v1", "/data/p.pt", "not/here.pt"])
def test_another_reference_in_a_file_stays_as_it_is(source, reference):
    assert named_in(source, reference) == reference


def test_a_path_in_a_file_does_not_lead_up(source):
    with pytest.raises(LocateError, match=r"'\.\./p\.pt' has '\.\.' in it.*absolute path"):
        named_in(source, "../p.pt")


def test_a_link_in_a_file_does_not_lead_out(source, tmp_path):
    (tmp_path / "secret.pt").touch()
    (tmp_path / "runs/p.pt").symlink_to("../secret.pt")

    with pytest.raises(LocateError, match=r"leads out of .*/runs, to .*/secret\.pt\. Write that"):
        named_in(source, "p.pt")


@pytest.mark.parametrize("reference", ["/etc/passwd", "~/p.pt", "../p.pt", "a/../p.pt", "a//p.pt"])
def test_a_file_of_the_hub_names_no_path_of_this_machine(reference):
    with pytest.raises(LocateError, match=r"of this machine|lead out of its folder"):
        named_in("owner/repo/int8/flash.yaml@abc", reference)


@pytest.mark.parametrize(
    ("model", "parts"),
    [("owner/repo", ("owner/repo", None)), ("owner/repo@v1", ("owner/repo", "v1"))],
)
def test_a_model_may_have_a_revision(model, parts):
    assert split_revision(model) == parts


def test_a_folder_may_have_an_at_in_its_name(tmp_path):
    (tmp_path / "w8a8@v1").mkdir()

    assert split_revision(str(tmp_path / "w8a8@v1")) == (str(tmp_path / "w8a8@v1"), None)


def test_a_reference_that_leads_nowhere_is_a_configuration_that_does():
    assert issubclass(LocateError, ConfigError)
