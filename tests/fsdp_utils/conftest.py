import pytest

from tests.fsdp_utils.cases import compute
from tests.fsdp_utils.workers import run_alone, run_workers


@pytest.fixture(scope="session")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """World size to the folder with what all cases gave."""
    folders = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        (folder / "results").mkdir()
        folders[world_size] = str(folder / "results")
        if world_size == 1:
            run_alone(compute, folders[1])
        else:
            run_workers(compute, folders[2], world_size=2, store_path=str(folder / "store"))
    return folders
