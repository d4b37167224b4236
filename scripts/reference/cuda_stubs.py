"""Put empty libraries in the place of the CUDA ones, so that torch's usual wheel loads without its gigabytes of CUDA.

usage: python cuda_stubs.py     (install.sh does it, with the environment's Python)

For every library that torch needs and that is absent, a stub with the right name is compiled into torch/lib (which is
on the libraries' search path). It defines each symbol that torch takes from it, under its version, as a function that
returns 0; cudaGetDeviceCount says that there is no device. Needs gcc, nm and readelf.
"""
import collections
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

SYSTEM = re.compile(r"^(lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp|gfortran|util|z|quadmath)\.so|ld-linux)")
SYSTEM_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")
NOT_OURS = re.compile(r"^_?Py|^_ITM_|^__gmon|^__cxa_finalize|^__tsan|^__sanitizer")  # the interpreter's, the linker's, tools'
NO_DEVICE = 100  # cudaErrorNoDevice
BODIES = {
    "cudaGetDeviceCount": f"int cudaGetDeviceCount(int *n) {{ if (n) *n = 0; return {NO_DEVICE}; }}",
    "cudaGetDevice": f"int cudaGetDevice(int *n) {{ if (n) *n = 0; return {NO_DEVICE}; }}",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int e) { return "stub"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(int e) { return "stub"; }',
}


def output(*command):
    return subprocess.run([str(c) for c in command], capture_output=True, text=True).stdout


def needed(library):
    return set(re.findall(r"NEEDED.*\[(.+?)\]", output("readelf", "-d", library)))


def symbols(library):
    """(names it defines, {version: names it wants})"""
    defined, wanted = set(), collections.defaultdict(set)
    for line in output("nm", "-D", "--with-symbol-versions", library).splitlines():
        fields = line.split()
        if len(fields) == 3:
            defined.add(fields[2].split("@")[0])
        elif len(fields) == 2 and fields[0] in "Uvw":
            name, _, version = fields[1].partition("@")
            wanted[version.lstrip("@")].add(name)
    return defined, wanted


def wanted_versions(library):
    """{name of a library it needs: versions it wants of it}"""
    versions, current = collections.defaultdict(set), None
    for line in output("readelf", "-V", "-W", library).splitlines():
        if match := re.search(r"Version: \d+\s+File: (\S+)", line):
            current = match[1]
        elif current and (match := re.search(r"Name: (\S+)\s+Flags", line)):
            versions[current].add(match[1])
    return versions


def system_symbols(names):
    found = set()
    for name in names:
        path = next((Path(folder, name) for folder in SYSTEM_FOLDERS if Path(folder, name).exists()), None)
        if path:
            found |= symbols(path)[0]
    return found


def build(path, by_version, unversioned):
    names = set(unversioned).union(*by_version.values())
    source = [BODIES.get(name, f"long {name}(void) {{ return 0; }}") for name in sorted(names)]
    source = source or [f"long stub_{re.sub(r'[^a-zA-Z0-9]', '_', path.name)}(void) {{ return 0; }}"]
    script = [f"{version} {{ global: {' '.join(name + ';' for name in sorted(names))} }};" for version, names in by_version.items()]
    with tempfile.TemporaryDirectory() as folder:
        code, versions = Path(folder, "stub.c"), Path(folder, "versions.map")
        code.write_text("\n".join(source) + "\n")
        versions.write_text("\n".join(script) + "\n")
        flags = ["-w", "-O1", "-fno-builtin", "-shared", "-fPIC", f"-Wl,-soname,{path.name}"]
        flags += [f"-Wl,--version-script={versions}"] if script else []
        subprocess.run(["gcc", *flags, "-o", path, code], check=True)


def main():
    packages = Path(sysconfig.get_paths()["purelib"])
    folder = packages / "torch" / "lib"
    libraries = sorted(folder.glob("*.so*")) + sorted((packages / "torch").glob("_C*.so"))
    present = {library.name for library in libraries}
    all_needed = set().union(*map(needed, libraries))
    defined, wanted, versions = set(), collections.defaultdict(set), collections.defaultdict(set)
    for library in libraries:
        own, others = symbols(library)
        defined |= own
        for version, names in others.items():
            wanted[version] |= names
        for name, some in wanted_versions(library).items():
            versions[name] |= some
    known = defined | system_symbols(name for name in all_needed if SYSTEM.match(name))
    unversioned = {name for name in wanted[""] - known if not NOT_OURS.match(name)}
    missing = sorted(name for name in all_needed - present if not SYSTEM.match(name))
    for i, name in enumerate(missing):
        # any one library can define the symbols that name no version
        build(folder / name, {version: wanted[version] for version in versions[name]}, unversioned if i == 0 else ())
        print("stub", name)


if __name__ == "__main__":
    main()
