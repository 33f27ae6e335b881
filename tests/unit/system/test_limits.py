"""How many cores a process may use."""

import pytest

from loaders.system import limits


def planted(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/box/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/pod/cpu.max": "400000 100000\n"}, 4.0),
        ({"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/box\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({}, None),
    ],
)
def test_the_tightest_quota_of_both_versions_of_cgroups_counts(tmp_path, files, quota):
    assert limits.quota_cores(planted(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "usable", "whole"), [(8, None, 8.0, 8), (8, 2.5, 2.5, 2), (8, 0.5, 0.5, 1), (2, 16.0, 2.0, 2)]
)
def test_affinity_and_quota_both_count_and_whole_cores_are_at_least_one(monkeypatch, affinity, quota, usable, whole):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(limits, "quota_cores", lambda: quota)
    assert (limits.usable_cores(), limits.whole_cores()) == (usable, whole)
