"""What a confined process may ask of the system: to read files, to use its memory and its threads,
to sleep and to end. All else fails with EPERM, in the kernel (seccomp(2), a filter of BPF).

No other process, no socket, no file written, made, renamed or removed, no signal to anybody: what
is not named here is not there, and that goes for what later kernels may bring.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machines that the filter is written for, as the kernel's audit numbers them."""

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CLONE_THREAD = 0x10000
AF_UNIX = 1
FIONBIO = 0x5421
F_SETFL, F_DUPFD_CLOEXEC = 4, 1030  # what fcntl may do: up to the first, and the second

_ALLOWED = """
    read 0 63             write 1 64            close 3 57            stat 4 -
    fstat 5 80            lstat 6 -             poll 7 -              lseek 8 62
    mmap 9 222            mprotect 10 226       munmap 11 215         brk 12 214
    rt_sigaction 13 134   rt_sigprocmask 14 135 rt_sigreturn 15 139   pread64 17 67
    readv 19 65           writev 20 66          access 21 -           pipe 22 -
    select 23 -           sched_yield 24 124    mremap 25 216         madvise 28 233
    dup 32 23             dup2 33 -             nanosleep 35 101      getpid 39 172
    exit 60 93            uname 63 160          getcwd 79 17          readlink 89 -
    gettimeofday 96 169   sysinfo 99 179        getuid 102 174        getgid 104 176
    geteuid 107 175       getegid 108 177       getppid 110 173       sigaltstack 131 132
    arch_prctl 158 -      gettid 186 178        time 201 -            futex 202 98
    sched_getaffinity 204 123                   getdents64 217 61     restart_syscall 219 128
    clock_gettime 228 113 clock_getres 229 114  clock_nanosleep 230 115
    exit_group 231 94     epoll_wait 232 -      epoll_ctl 233 21      newfstatat 262 79
    readlinkat 267 78     faccessat 269 48      pselect6 270 72       ppoll 271 73
    set_robust_list 273 99                      epoll_pwait 281 22    eventfd2 290 19
    epoll_create1 291 20  dup3 292 24           pipe2 293 59          getrandom 318 278
    getsockname 51 204    getsockopt 55 209
    statx 332 291         rseq 334 293          close_range 436 436   faccessat2 439 439
"""
"""Calls and their numbers, on x86-64 and on arm64."""

_OPEN, _OPENAT = (2, None), (257, 56)
_SOCKETPAIR, _CLONE, _FCNTL = (53, 199), (56, 220), (72, 25)
_IOCTL, _CLONE3 = (16, 29), (435, 435)

# instructions of classic BPF (linux/filter.h), and what a filter returns (linux/seccomp.h)
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # prctl(2)

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def confine() -> None:
    """Take the rights of this process away, for good. Raises OSError where that cannot be."""
    machine = os.uname().machine
    if machine not in AUDIT:
        raise OSError(errno.ENOSYS, f"no filter is written for {machine}")
    program = b"".join(struct.pack("=HBBI", *one) for one in _program(machine))
    instructions = ctypes.create_string_buffer(program)
    address = ctypes.addressof(instructions)
    fprog = struct.pack("@HP", len(program) // 8, address)
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), zero, zero, zero):
        raise OSError(ctypes.get_errno(), "prctl")
    if libc.prctl(_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.create_string_buffer(fprog)):
        raise OSError(ctypes.get_errno(), "seccomp")


def _program(machine: str) -> list[Instruction]:
    column = list(AUDIT).index(machine)
    program = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, AUDIT[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    words = _ALLOWED.split()
    for number in words[1 + column :: 3]:
        if number != "-":
            program += _when(int(number), [(_RETURN, 0, 0, _ALLOW)])
    for call, rule in (
        (_OPEN, _unless(1, _ANY_BIT, WRITES)),
        (_OPENAT, _unless(2, _ANY_BIT, WRITES)),
        (_SOCKETPAIR, _only(0, _EQUAL, AF_UNIX)),
        (_CLONE, _only(0, _ANY_BIT, CLONE_THREAD)),
        (_FCNTL, _fcntl()),
        (_IOCTL, _only(1, _EQUAL, FIONBIO, errno.ENOTTY)),  # as of what is no terminal
        (_CLONE3, [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]),  # so that clone is tried
    ):
        if (wanted := call[column]) is not None:
            program += _when(wanted, rule)
    return [*program, (_RETURN, 0, 0, _ERRNO | errno.EPERM)]


def _when(number: int, rule: list[Instruction]) -> list[Instruction]:
    """A rule for the call of a number, which returns."""
    return [(_EQUAL, 0, len(rule), number), *rule]


def _argument(place: int) -> Instruction:
    """Load the low half of an argument; what is looked at here are ints."""
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * place)


def _only(place: int, test: int, value: int, error: int = errno.EPERM) -> list[Instruction]:
    """Allow a call whose argument passes a test."""
    refused = (_RETURN, 0, 0, _ERRNO | error)
    return [_argument(place), (test, 0, 1, value), (_RETURN, 0, 0, _ALLOW), refused]


def _unless(place: int, test: int, value: int) -> list[Instruction]:
    """Refuse a call whose argument passes a test."""
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    return [_argument(place), (test, 0, 1, value), refused, (_RETURN, 0, 0, _ALLOW)]


def _fcntl() -> list[Instruction]:
    """Flags and copies of descriptors: no locks, no leases, no owner who is sent signals."""
    return [
        _argument(1),
        (_EQUAL, 1, 0, F_DUPFD_CLOEXEC),
        (_GREATER, 1, 0, F_SETFL),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
