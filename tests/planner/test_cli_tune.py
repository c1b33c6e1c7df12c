"""medha-tune: what it says without a GPU, and its files with a device that a test makes up."""

import sys

import pytest
import torch
from msgspec import structs

from codegen import clock, machine, meter, problems, tune
from codegen.clock import Timing
from codegen.kernels import KERNELS, load_spec
from codegen.machine import Machine
from codegen.problems import Where
from planner import cli_tune, profiles, tuned
from planner.profile import TABLES
from planner.profiles import read_profile
from plans.codec import load_file
from plans.tuned import Tuned

SIZES = {"tokens": 2, "heads": 32, "head_dim": 64}
MACHINE = Machine(
    name="NVIDIA H200",
    memory_bytes=150108897280,
    compute_capability="9.0",
    driver="580",
    torch="2.11",
    triton="3.6.0",
    devices=1,
)


@pytest.fixture
def medha_tune(monkeypatch, capfd):
    """The command in this process: (exit status, stdout, stderr)."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["medha-tune", *map(str, argv)])
        try:
            cli_tune.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A device whose times are made up; the catalog's folders are the test's own."""
    monkeypatch.setattr(machine, "machine", lambda: MACHINE)
    here = Where(device=torch.device("cpu"), dtype=torch.float16, cold=False)
    monkeypatch.setattr(machine, "first_device", lambda: here)
    monkeypatch.setattr(problems, "rates", lambda device: (1e14, 1e12))
    monkeypatch.setattr(tune.Gate, "reasons", lambda self, pairs: [()] * len(pairs))
    monkeypatch.setattr(tune, "PROBLEMS", {"rope": {"rows": (SIZES,)}})
    monkeypatch.setattr(clock, "GraphClock", lambda **_: times)
    monkeypatch.setattr(
        meter, "METHODS", dict.fromkeys(meter.METHODS, lambda *_: Timing(us=3.0, spread_us=0.1))
    )
    monkeypatch.setattr(profiles, "PROFILES", tmp_path / "catalog" / "profiles")
    monkeypatch.setattr(tuned, "TUNED", tmp_path / "catalog" / "tuned")
    return tmp_path


def times(groups):
    for group in groups:
        group[0]()
    return [Timing(us=10.0 - at, spread_us=0.1) for at in range(len(groups))]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_ends_with_1_and_says_what_works(medha_tune):
    status, out, err = medha_tune()
    assert status == 1
    assert out == ""
    assert "no CUDA device is visible" in err
    assert err.rstrip().endswith("medha-tune --dry-run lists what it would do")


def test_a_dry_run_lists_every_tunable_op_and_every_table(medha_tune):
    status, out, _ = medha_tune("--dry-run")
    assert status == 0
    for op in KERNELS:
        if load_spec(op).searches:
            assert f"kernel {op} " in out
        elif load_spec(op).params:
            assert f"not tuned: {op}: its spec names no search space" in out
    for table in (*TABLES, "links"):
        assert f"profile {table}: " in out
    assert "--effort quick: " in out


def test_a_dry_run_lists_only_what_was_asked_for(medha_tune):
    _, out, _ = medha_tune("--dry-run", "--kernels", "--op", "rope")
    assert {line.split()[1] for line in out.splitlines() if line.startswith("kernel")} == {"rope"}
    assert "profile" not in out
    _, out, _ = medha_tune("--dry-run", "--profile", "--table", "copy")
    assert "kernel" not in out
    assert "profile copy" in out
    assert "profile gemm" not in out


def test_a_name_of_one_half_asks_for_that_half_alone(medha_tune):
    _, out, _ = medha_tune("--dry-run", "--op", "rope")
    assert "kernel rope " in out
    assert "profile" not in out
    _, out, _ = medha_tune("--dry-run", "--table", "links", "--limit-s", "60")
    assert "profile links: " in out
    assert "kernel" not in out


def test_a_dry_run_lists_links_only_where_a_run_measures_them(medha_tune):
    _, out, _ = medha_tune("--dry-run", "--profile", "--table", "copy")
    assert "profile links" not in out
    _, out, _ = medha_tune("--dry-run", "--profile", "--table", "copy,links")
    assert "profile links" in out


def test_a_table_alone_tunes_no_kernel_and_an_op_alone_profiles_nothing(medha_tune, device):
    assert medha_tune("--table", "copy", "--out", device / "tables")[0] == 0
    assert [path.name for path in (device / "tables").iterdir()] == ["profiles"]
    assert medha_tune("--op", "rope", "--out", device / "ops")[0] == 0
    assert [path.name for path in (device / "ops").iterdir()] == ["tuned"]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--dry-run", "--kernels", "--table", "copy"), "--table is of --profile"),
        (("--dry-run", "--profile", "--op", "rope"), "--op is of --kernels"),
        (("--dry-run", "--op", "rope", "--table", "copy"), "--op is of the kernels, --table of"),
        (("--dry-run", "--op", "rope,rope"), "--op rope,rope: 'rope' stands twice"),
        (("--dry-run", "--table", "copy,copy"), "--table copy,copy: 'copy' stands twice"),
        (("--dry-run", "--op", "silu"), "--op silu: it has no tunables; ops to tune: add_rms_norm"),
        (("--dry-run", "--op", "rop"), "unknown op 'rop'; nearest: rope"),
        (("--dry-run", "--table", "gemms"), "unknown table 'gemms'; nearest: gemm"),
        (("--dry-run", "--effort", "max"), "--effort max: one of none, quick, full"),
        (("--dry-run", "--limit-s", "nan"), "--limit-s nan: not a time above 0"),
        (("--dry-run", "--limit-s", "0"), "--limit-s 0: not a time above 0, such as 300"),
    ],
)
def test_wrong_names_end_with_2(medha_tune, argv, complaint):
    status, _, err = medha_tune(*argv)
    assert status == 2
    assert complaint in err


@pytest.mark.parametrize("flag", ["--out", "--install"])
def test_what_cannot_be_written_is_said_before_anything_is_measured(medha_tune, device, flag):
    (device / "catalog").write_text("in the way of profiles/ and tuned/")
    blocked = device / "catalog" / "out" if flag == "--out" else device / "out"
    status, out, err = medha_tune("--install", "--out", blocked)
    assert (status, out) == (2, "")
    assert err.startswith(f"{flag}: {device / 'catalog'}")
    assert err.endswith("cannot be written: Not a directory\n")
    assert not list(device.glob("out/*/*"))


def test_tuning_writes_dated_records_and_installs_them_when_asked(medha_tune, device):
    out = device / "out"
    status, text, err = medha_tune("--kernels", "--op", "rope", "--out", out)
    assert status == 0, err
    record = load_file(out / "tuned" / "h200-sxm-141gb" / "rope.yaml", Tuned)
    assert (record.device, record.triton, record.effort) == ("NVIDIA H200", "3.6.0", "quick")
    assert record.source_sha256 == tune.source_sha256("rope")
    (bucket,) = record.buckets
    assert bucket.us < bucket.default_us == 10.0
    assert "not installed" in text
    assert "x the default" in text
    assert not (device / "catalog").exists()
    medha_tune("--kernels", "--op", "rope", "--out", out, "--install")
    installed = tuned.load_records("h200-sxm-141gb")["rope"]
    assert [each.params for each in installed.buckets] == [bucket.params]


def test_a_second_run_keeps_buckets_of_other_shapes(medha_tune, device, monkeypatch):
    out = device / "out"
    medha_tune("--kernels", "--op", "rope", "--out", out)
    monkeypatch.setattr(tune, "PROBLEMS", {"rope": {"rows": ({**SIZES, "tokens": 3},)}})
    medha_tune("--kernels", "--op", "rope", "--out", out)
    record = load_file(out / "tuned" / "h200-sxm-141gb" / "rope.yaml", Tuned)
    assert [each.when["tokens"] for each in record.buckets] == [2, 3]


def test_a_profile_is_written_resumed_and_installed(medha_tune, device):
    out = device / "out"
    status, text, err = medha_tune("--profile", "--table", "copy", "--out", out, "--install")
    assert status == 0, err
    assert "copy: 7 rows" in text
    installed = read_profile(profiles.PROFILES / "h200-sxm-141gb")
    assert installed.about.device == "NVIDIA H200"
    assert installed.about.command.startswith("medha-tune --profile")
    assert {row.us for row in installed.rows("copy")} == {3.0}
    _, _, err = medha_tune("--profile", "--table", "copy", "--out", out)
    assert "0 measured, 7 there already" in err


def test_a_folder_of_another_machine_is_refused(medha_tune, device, monkeypatch):
    out = device / "out"
    medha_tune("--profile", "--table", "copy", "--out", out)
    other = Machine(**{**vars(MACHINE), "triton": "3.7.1"})
    monkeypatch.setattr(machine, "machine", lambda: other)
    status, _, err = medha_tune("--profile", "--table", "copy", "--out", out)
    assert status == 2
    assert "a profile of another triton" in err
    about = load_file(out / "profiles" / "h200-sxm-141gb" / "about.yaml", profiles.About)
    assert structs.asdict(about)["triton"] == "3.6.0"


@pytest.fixture
def two_devices(device, monkeypatch):
    """The same machine with a second device, and links whose times are made up."""
    monkeypatch.setattr(machine, "machine", lambda: Machine(**{**vars(MACHINE), "devices": 2}))
    asked = []

    def measure_links(rows, devices, *, limit_s):
        asked.append((devices, limit_s))
        return {row: Timing(us=20 + row[1] / 1e4, spread_us=0.5) for row in rows[:-4]}

    monkeypatch.setattr("codegen.links.measure_links", measure_links)
    return device, asked


def test_links_alone_go_into_an_older_profile_and_say_where_they_come_from(medha_tune, two_devices):
    device, asked = two_devices
    old, out = device / "old", device / "new"
    medha_tune("--profile", "--table", "copy", "--out", old, "--install")
    status, _, err = medha_tune(
        *("--profile", "--table", "links", "--limit-s", "60", "--out", out, "--install")
    )
    assert status == 0, err
    assert [devices for devices, _ in asked] == [2]
    assert 50 < asked[0][1] <= 60
    assert "4 points left for lack of time" in err
    found = read_profile(profiles.PROFILES / "h200-sxm-141gb")
    assert set(found.tables) == {"copy", "links"}
    ops = {row.key[0] for row in found.rows("links", None)}
    assert ops == {"all_reduce", "all_gather", "send_recv", "all_to_all"}
    assert found.about.command.startswith("medha-tune --profile --table copy")
    assert "--table links" in found.about.sources["links"]
    assert "driver 580" in found.about.sources["links"]


def test_links_between_one_device_are_an_error_that_says_so(medha_tune, device):
    status, _, err = medha_tune("--profile", "--table", "links", "--out", device / "out")
    assert status == 1
    assert "links are measured between two or more CUDA devices" in err


def test_a_table_that_is_measured_again_takes_its_factor_and_its_words_with_it(tmp_path):
    about = profiles.About(
        device="x", driver="1", torch="1", triton="1", made="a", command="old",
        sources={"gemm": "cold", "copy": "kept"}, kernels={"linear": "1", "rope": "1"},
        hot={"gemm": 1.1, "rows": 1.2},
    )  # fmt: skip
    row = profiles.Row(key=("linear", 8, 8, 1), role="fit", us=1.0, spread_us=0.0)
    new = profiles.Profile(
        folder=tmp_path,
        about=structs.replace(about, made="b", command="new", kernels={"linear": "2", "rope": "2"}),
        tables={"gemm": (row,)},
    )
    new = profiles.Profile(
        folder=tmp_path, about=structs.replace(new.about, sources={}, hot={}), tables=new.tables
    )
    found = profiles.merged(about, new)
    assert found.hot == {"rows": 1.2}
    assert found.kernels == {"linear": "2", "rope": "1"}
    assert found.sources["copy"] == "kept"
    assert found.sources["gemm"].startswith("made b by new")
    assert (found.made, found.command) == ("a", "old")
