"""The page of many nodes, and the scripts beside it."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.make_options import page as options_page
from lf_lightning.__main__ import COMMANDS
from lf_lightning.data import build, cache_lock


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "docs" / "many-nodes"


def commands(text: str) -> list[str]:
    """The commands of lf-lightning in a text, each as one line."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"(?:lf-lightning|-m lf_lightning) (\w+(?: (?!#|&&|\|\|)\S+)*)", joined)


def test_every_command_of_the_page_and_its_scripts_exists(root: Path, folder: Path):
    page = (root / "docs" / "many-nodes.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("    ")]
    found = commands("\n".join(lines)) + commands((folder / "slurm.sh").read_text(encoding="utf-8"))
    assert len(found) >= 7
    assert {line.split()[0] for line in found} == {"prepare", "fit"} <= COMMANDS.keys()
    for name in re.findall(r"configs/\S+\.yaml", "\n".join(found)):
        assert (root / name).is_file()
    known = re.findall(r"(?m)^\| `(\w+)`", options_page())
    options = re.findall(r"--([a-z]\S*)", "\n".join(found))
    for option in options:
        assert option in ("config", "ckpt_path", "trainer.num_nodes", "trainer.devices") or option[5:] in known


def test_the_page_gives_the_numbers_of_the_code(root: Path):
    page = (root / "docs" / "many-nodes.md").read_text(encoding="utf-8")
    assert build.CHUNK_ROWS == 1000
    assert "chunks of 1,000 rows" in page
    assert build.LINE_SECONDS == 15
    assert "every 15 seconds" in page
    assert cache_lock.STALE_SECONDS == 180
    assert "after three minutes of silence" in page
    assert cache_lock.REPORT_SECONDS == 60
    assert "once a minute" in page
    assert cache_lock.BEAT_SECONDS * 6 <= cache_lock.STALE_SECONDS


def script_of_slurm(folder: Path, tmp_path: Path, fit: str) -> tuple[int, list[str]]:
    """Run the job's script where srun and scontrol only note that they were called; fit ends as it is told."""
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("needs bash")
    programs = {
        "srun": f'echo "srun $*" >> calls\ncase "$*" in *" fit "*) {fit};; esac',
        "scontrol": 'echo "scontrol $*" >> calls',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!{shell}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    environment |= {"SLURM_JOB_ID": "77"}
    script = str(folder / "slurm.sh")
    assert subprocess.run([shell, "-n", script], check=False).returncode == 0
    done = subprocess.run([shell, script, "run.yaml"], cwd=tmp_path, env=environment, check=False, timeout=60)
    return done.returncode, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("fit", "code", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 1", 1, False),
        ("exit 138", 138, True),
        ("exit 143", 143, True),
        ("kill -USR1 $$", 138, True),
    ],
)
def test_the_slurm_job_goes_back_into_the_queue_after_a_signal_alone(
    fit: str, code: int, requeued: bool, folder: Path, tmp_path: Path
):
    got, calls = script_of_slurm(folder, tmp_path, fit)
    assert got == code
    assert calls[:2] == [
        "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 lf-lightning prepare --config run.yaml",
        "srun --kill-on-bad-exit=1 lf-lightning fit --config run.yaml --trainer.num_nodes 2 --trainer.devices 8 "
        "--ckpt_path last",
    ]
    assert calls[2:] == (["scontrol requeue 77"] if requeued else [])


def test_the_slurm_job_asks_for_a_warning_and_for_as_many_tasks_as_devices(folder: Path):
    directives = dict(re.findall(r"(?m)^#SBATCH --([\w-]+)=(\S+)", (folder / "slurm.sh").read_text()))
    assert directives["signal"] == "USR1@120"
    assert directives["ntasks-per-node"] == directives["gpus-per-node"]
    assert "#SBATCH --requeue" in (folder / "slurm.sh").read_text()


def test_the_kubernetes_job_has_a_name_for_every_pod_and_one_pod_a_node(folder: Path):
    service, job = yaml.safe_load_all((folder / "kubernetes.yaml").read_text(encoding="utf-8"))
    name, spec = job["metadata"]["name"], job["spec"]
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    (fit,), (prepare,) = spec["template"]["spec"]["containers"], spec["template"]["spec"]["initContainers"]
    environment = {entry["name"]: entry["value"] for entry in fit["env"]}
    assert environment["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    command: str = fit["command"][-1]
    assert command.startswith("NODE_RANK=$JOB_COMPLETION_INDEX exec lf-lightning fit ")
    assert f"--trainer.num_nodes {spec['completions']} " in command
    assert spec["parallelism"] == spec["completions"]
    assert f"--trainer.devices {fit['resources']['limits']['nvidia.com/gpu']} " in command
    assert command.endswith("--ckpt_path last")
    mounts: list[dict[str, Any]] = fit["volumeMounts"] + prepare["volumeMounts"]
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert prepare["command"][:2] == ["lf-lightning", "prepare"]
