"""A hub of models in a folder, with the functions of `huggingface_hub` in use."""

import inspect
import shutil
import sys
import types
from pathlib import Path

from keras.src.saving import saving_lib


def installed(folder, monkeypatch):
    """Puts it in the place of `huggingface_hub`, for Keras and for `import`."""
    hub = fake(Path(folder))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr(saving_lib, "huggingface_hub", hub)
    # Where pydot is installed, Keras draws the model, and fails without Graphviz.
    monkeypatch.setattr(saving_lib, "check_pydot", lambda: False)
    return hub


def fake(folder):
    """The module; repositories are folders in `folder`."""

    class Url:
        def __init__(self, repo_id):
            self.repo_id = repo_id

    class HfApi:
        def __init__(self, *, library_name=None, library_version=None):
            pass

        def create_repo(self, repo_id, *, exist_ok=False):
            (folder / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return Url(repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message=None):
            shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            (folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def snapshot_download(repo_id, *, library_name=None, library_version=None):
        return str(folder / repo_id)

    hub = types.ModuleType("huggingface_hub")
    hub.HfApi, hub.snapshot_download = HfApi, snapshot_download
    return hub


def differences(real):
    """Arguments of the fake functions that the real ones do not have."""
    hub = fake(Path())
    methods = ("__init__", "create_repo", "upload_folder", "upload_file")
    pairs = [
        (hub.snapshot_download, real.snapshot_download),
        *((getattr(hub.HfApi, name), getattr(real.HfApi, name)) for name in methods),
    ]
    return [
        f"{ours.__qualname__}: {name}"
        for ours, theirs in pairs
        for name in inspect.signature(ours).parameters
        if name not in inspect.signature(theirs).parameters
    ]
