from benchmarks.delivery import calls_between_marks

LOG = """\
11 stat("/usr/lib", 0x7ff) = 0
11 newfstatat(AT_FDCWD, "/begin of the count", 0x7ff, 0) = -1 ENOENT (No such file or directory)
12 readv(5,  <unfinished ...>
11 poll([{fd=3, events=POLLIN}], 1, -1 <unfinished ...>
12 <... readv resumed>[{iov_base="", iov_len=64}], 1) = 64
12 --- SIGCHLD {si_signo=SIGCHLD} ---
12 write(7, "a", 160) = 160
11 <... poll resumed>) = 1
13 +++ exited with 0 +++
11 newfstatat(AT_FDCWD, "/end of the count", 0x7ff, 0) = -1 ENOENT (No such file or directory)
11 close(3) = 0
""".splitlines()


def test_calls_of_all_processes_between_the_marks_are_counted_once():
    assert calls_between_marks(LOG) == 3


def test_without_a_call_between_the_marks_there_is_none():
    assert calls_between_marks([line for line in LOG if "count" in line]) == 0
