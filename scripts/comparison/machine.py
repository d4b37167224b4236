"""What both comparisons share: processes, what the machine is, results as files."""
import datetime
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def last_json(command, environment=None):
    """Runs a process: its last line of JSON."""
    process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True)
    if process.returncode != 0:
        sys.exit(f"{command[0]} failed with status {process.returncode}; its messages are above")
    return json.loads(process.stdout.strip().splitlines()[-1])


def built(*target):
    """Builds a target (--bench NAME, --bin NAME and features); the path of its executable."""
    command = ["cargo", "build", "--profile", "bench", *target, "--message-format", "json"]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    messages = (json.loads(line) for line in output.splitlines())
    return next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] in target)


def first_line(*command):
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(*packages):
    """The versions of those packages that are there."""
    for package in packages:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass


def about(commit=None):
    """Date, versions, and the commit: the one that is given of a program that was built elsewhere, else this folder's."""
    here = {"commit": first_line("git", "rev-parse", "--short", "HEAD"), "rustc": first_line("rustc", "--version")}
    return {"date": datetime.date.today().isoformat(), **({"commit": commit} if commit else here), **dict(installed("torch", "diffusers", "transformers"))}


def store(out, name, title, notes, table, rows):
    """Stores a table and all that was measured as OUT/<date>-NAME.{md,json}; what the former holds."""
    text = "\n".join([f"# {notes['date']}: {title}", "", "`" + shlex.join(["python", "scripts/compare.py", *sys.argv[1:]]) + "`", "",
                      *[f"- {k}: {v}" for k, v in notes.items()], "", *table, ""])
    path = Path(out) / f"{notes['date']}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps({**notes, "rows": rows}, indent=1) + "\n")
    return text
