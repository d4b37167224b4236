"""What both comparisons share: processes, what the machine is, results as files."""
import datetime
import json
import platform
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


def about():
    """Date, commit and the versions of what is compared."""
    import diffusers
    import torch
    import transformers

    return {
        "date": datetime.date.today().isoformat(), "commit": first_line("git", "rev-parse", "--short", "HEAD"),
        "rustc": first_line("rustc", "--version"), "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def store(out, name, title, notes, table, rows):
    """Prints a table, and stores it and all that was measured as OUT/<date>-NAME.{md,json}."""
    text = "\n".join([f"# {notes['date']}: {title}", "", "`" + " ".join(["python", "scripts/compare.py", *sys.argv[1:]]) + "`", "",
                      *[f"- {k}: {v}" for k, v in notes.items()], "", *table, ""])
    path = Path(out) / f"{notes['date']}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".json").write_text(json.dumps({**notes, "rows": rows}, indent=1) + "\n")
    print(text)
