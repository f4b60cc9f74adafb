"""What runs a program that a model wrote, in a process of its own: `python -I sandbox_child.py`, started by `sandbox`.

It imports the standard library only and takes nothing from the process that starts it but one JSON object on stdin:
`program`, `token`, `answer` (a descriptor), `seconds`, `memory`, `disk` (bytes), `confine`. What came of it goes to the
descriptor: the token when the program reached its end, else one line about the error. The program would have to search
this process for the token: that guards against a program that ends early, not against one that attacks this file.

First process: enters namespaces of its own (no network, no other process, every file system read-only, a small one in
memory as the working folder). Second process, the first of its process namespace: limits, then the program. When it
ends, the kernel ends whatever it started.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys

CLONE = {"NEWNS": 0x20000, "NEWIPC": 0x08000000, "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
LOCKED = {"nosuid": 2, "nodev": 4, "noexec": 8}
"""Options of a mount that a namespace of another user may not take off (mount_namespaces(7))."""
MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_THREAD = 0x10000
FORKS = {
    "x86_64": (0xC000003E, {"clone": 56, "clone3": 435, "others": (57, 58)}),
    "aarch64": (0xC00000B7, {"clone": 220, "clone3": 435, "others": ()}),
}
"""Machine → its name to seccomp, and the numbers of the calls that make processes."""
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """A function of libc that returns 0 where it worked.

    Raises:
        OSError: it did not.
    """
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def confine(folder: str, disk: int) -> None:
    """No network, no other process, nothing to write but `folder`, which holds at most `disk` bytes.

    Raises:
        OSError: this kernel does not let an ordinary user do so.
    """
    user, group = os.getuid(), os.getgid()
    call("unshare", sum(CLONE.values()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _read_only()
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={disk},nr_inodes=1024".encode())


def _read_only() -> None:
    """Every mount read-only: by one call from Linux 5.12 on, before that one by one."""
    attributes = struct.pack("=4Q", MOUNT_ATTR_RDONLY, 0, 0, 0)
    if libc.syscall(MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, attributes, len(attributes)) == 0:
        return
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = [line.split(" ")[4:6] for line in file]
    for place, options in mounts:
        kept = sum(flag for name, flag in LOCKED.items() if name in options.split(","))  # may not be taken off here
        where = place.encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1")
        try:
            call("mount", None, where, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept, None)
        except (PermissionError, FileNotFoundError) as error:
            if error.errno == errno.EPERM:
                raise
            # EACCES, ENOENT: below what is closed to the user, or hidden by another mount; a program gets there no more


def limit(seconds: int, memory: int, disk: int) -> None:
    """Time on the CPU, memory, size of a file, open files, threads; and no process beside this one."""
    limits = {"CPU": seconds, "AS": memory, "FSIZE": disk, "CORE": 0, "NOFILE": 64, "NPROC": 32}
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    no_processes()


def no_processes() -> None:
    """Let seccomp refuse every call that makes a process; threads stay. RLIMIT_NPROC does not bind root, and before
    Linux 5.14 it counts all processes of the user. Its own capabilities go too: no program that is started regains
    any. On a machine that is not in `FORKS` RLIMIT_NPROC is alone."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header, nothing = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", 0, 0, 0, 0, 0, 0)
    call("capset", header, nothing)
    if platform.machine() not in FORKS:
        return
    machine, numbers = FORKS[platform.machine()]
    code = _filter(machine, numbers["clone"], numbers["clone3"], numbers["others"])  # type: ignore[arg-type]
    held = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("HL", len(code) // 8, ctypes.addressof(held)))
    call("prctl", PR_SET_SECCOMP, 2, ctypes.c_void_p(ctypes.addressof(program)), 0, 0)


def _filter(machine: int, clone: int, clone3: int, others: tuple[int, ...]) -> bytes:
    """The filter in BPF (struct seccomp_data: nr at 0, arch at 4, the first argument at 16)."""
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, denied, missing = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM; ENOSYS: libc takes clone instead
    # (code, jump when so, jump when not, value); jumps are filled in as distances to the answers at the end.
    tests: list[tuple[int, int, str, str]] = [(load, 4, "", ""), (equal, machine, "", "denied"), (load, 0, "", "")]
    tests += [(at_least, 0x40000000, "denied", ""), *((equal, number, "denied", "") for number in others)]
    tests += [(equal, clone3, "missing", ""), (equal, clone, "", "allow")]
    tests += [(load, 16, "", ""), (bits, CLONE_THREAD, "allow", "denied")]
    places = {name: len(tests) + index for index, name in enumerate(("allow", "denied", "missing"))}

    def distance(name: str, here: int) -> int:
        return places[name] - here - 1 if name else 0

    lines = [
        struct.pack("=HBBI", code, distance(yes, here), distance(no, here), value)
        for here, (code, value, yes, no) in enumerate(tests)
    ]
    return b"".join(lines + [struct.pack("=HBBI", answer, 0, 0, value) for value in (allow, denied, missing)])


def run(program: str, token: str, answer: int) -> None:
    """Run the program to its end and answer; never returns."""
    told = token
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        told = f"{type(error).__name__}: {error}"[:200]
    os.write(answer, told.encode("utf-8", "replace"))
    os._exit(0)


def main() -> None:
    """Read the order, run it, wait for its end."""
    order = json.loads(sys.stdin.buffer.read())
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if order["confine"]:
        try:
            confine(os.getcwd(), order["disk"])
        except OSError as error:
            os.write(order["answer"], f"{order['token']} {error.strerror}".encode())
            os._exit(1)
    folder = os.getcwd()
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.chdir(folder)  # the file system that lies over it by now
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nothing, descriptor)
        limit(order["seconds"], order["memory"], order["disk"])
        run(order["program"], order["token"], order["answer"])
    status = os.waitpid(child, 0)[1]
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


if __name__ == "__main__":
    main()
