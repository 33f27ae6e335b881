from loaders.doctor import imports


class Plain:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return index


def test_what_a_worker_imports_is_listed_with_times():
    found = imports.check_worker_imports(Plain())
    assert found.severity == "fine"
    assert "numpy" in found.what
    assert " ms" in found.what


def test_every_worker_imports_numpy_and_no_torch():
    loaded = {name.partition(".")[0] for name, _ in imports.import_times([])}
    assert {"numpy", "loaders"} <= loaded
    assert "torch" not in loaded


def test_modules_that_fail_are_left_out():
    names = {name for name, seconds in imports.import_times(["no_such_module", "wave"]) if seconds >= 0}
    assert "wave" in names
