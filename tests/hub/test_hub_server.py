"""The Hub on this machine answers huggingface_hub as the real one does."""

from tests.hub_server import TOKENS

CLIENT = """
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
api, repo = HfApi(), "alice/tiny"

def refused(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except kind as error:
        return error
    raise SystemExit("not refused")
"""
PUSH = """
assert api.whoami()["name"] == "alice"
api.create_repo(repo); api.create_repo(repo, exist_ok=True)
refused(HfHubHTTPError, api.create_repo, repo)
Path("up/sub").mkdir(parents=True)
Path("up/README.md").write_text("---\\nlicense: mit\\n---\\n# hello")
Path("up/sub/deep.bin").write_bytes(bytes(range(256)) * 40)
first = api.upload_folder(folder_path="up", repo_id=repo, commit_message="first").oid
adds = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("b/c.txt", b"c"), CommitOperationAdd("b/d.txt", b"d")]
api.create_commit(repo, adds, commit_message="second")
copied = [CommitOperationCopy("a.txt", "e.txt"), CommitOperationDelete("b/c.txt")]
api.create_commit(repo, copied, commit_message="third", parent_commit=api.model_info(repo).sha)
assert api.create_commit(repo, [CommitOperationAdd("a.txt", b"a")], commit_message="nothing").oid
api.create_commit(repo, [CommitOperationDelete("b/", is_folder=True)], commit_message="fourth")
late = [CommitOperationAdd("late.txt", b"late")]
refused(HfHubHTTPError, api.create_commit, repo, late, commit_message="late", parent_commit=first)
assert sorted(api.list_repo_files(repo)) == ["README.md", "a.txt", "e.txt", "sub/deep.bin"]
assert sorted(api.list_repo_files(repo, revision=first)) == ["README.md", "sub/deep.bin"]
assert [one.path for one in api.list_repo_tree(repo, "sub")] == ["sub/deep.bin"]
api.create_branch(repo, branch="next"); api.create_branch(repo, branch="next", exist_ok=True)
api.upload_file(path_or_fileobj=b"n", path_in_repo="n.txt", repo_id=repo, revision="next")
refused(RevisionNotFoundError, api.upload_file, path_or_fileobj=b"n", path_in_repo="n", repo_id=repo, revision="none")
assert {ref.name for ref in api.list_repo_refs(repo).branches} == {"main", "next"}
assert api.file_exists(repo, "n.txt", revision="next") and not api.file_exists(repo, "n.txt")
bad = b"---\\nlicense: mine\\nbase_model: /tmp/x\\n---\\n"
error = refused(ValueError, api.upload_file, path_or_fileobj=bad, path_in_repo="README.md", repo_id=repo)
assert '"base_model" with value "/tmp/x" is not valid' in str(error) and '"license" must be' in str(error)
refused(HfHubHTTPError, api.create_repo, "bob/theirs")
print(first)
"""
PULL = """
import sys
first = sys.argv[1]
assert Path(snapshot_download(repo), "sub/deep.bin").read_bytes() == bytes(range(256)) * 40
assert not Path(snapshot_download(repo, revision=first), "a.txt").exists()
assert Path(hf_hub_download(repo, "n.txt", revision="next")).read_text() == "n"
assert Path(hf_hub_download(repo, "README.md", revision=first)).parent.name == first
refused(EntryNotFoundError, hf_hub_download, repo, "n.txt")
refused(RevisionNotFoundError, hf_hub_download, repo, "a.txt", revision="none")
refused(RepositoryNotFoundError, hf_hub_download, "alice/none", "a.txt")
assert api.model_info(repo).card_data.license == "mit"
"""
PRIVATE = """
import sys
right, other = sys.argv[1:]
assert Path(hf_hub_download("alice/secret", "a.txt", token=right)).read_text() == "a"
for token in (other, False):
    given = {"token": token, "cache_dir": f"cache-{token}"}
    refused(RepositoryNotFoundError, hf_hub_download, "alice/secret", "a.txt", **given)
    pushed = {"path_or_fileobj": b"n", "path_in_repo": "n", "repo_id": "alice/open", "token": token}
    refused(HfHubHTTPError, api.upload_file, **pushed)
error = refused(HfHubHTTPError, hf_hub_download, "alice/secret", "a.txt", token="hf_x", cache_dir="cache-x")
assert error.response.status_code == 401, error
"""


def test_what_is_pushed_can_be_pulled(hub, run_python):
    first = run_python(CLIENT + PUSH, hub.env()).split()[-1]
    run_python(CLIENT + PULL, hub.env(token=None), home="another", arguments=[first])
    assert hub.repos["alice/tiny"].titles[1:5] == ["first", "second", "third", "fourth"]
    assert hub.files("alice/tiny", "next")["n.txt"] == b"n"


def test_private_repositories_want_the_right_token(hub, run_python):
    hub.write("alice/secret", {"a.txt": b"a"}, is_private=True)
    hub.write("alice/open", {"a.txt": b"a"})
    run_python(CLIENT + PRIVATE, hub.env(None), arguments=[TOKENS["alice"], TOKENS["bob"]])
