import pytest

from tests.attention.world import KERNELS


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Every kernel that runs on the device."""
    return KERNELS[request.param]
