"""Every example of a public function, under every law that applies to it."""

import pytest
from laws.collection import examples
from laws.harness import LAWS, applies


def cases():
    # Example by example rather than law by law, because the laws of one example share what was compiled for it.
    for example in examples():
        for law in LAWS:
            if applies(law, example):
                reason = example.exempt.get(law)
                marks = pytest.mark.skip(reason=f"{example.name}: {reason}") if reason else ()
                yield pytest.param(law, example, id=f"{example.name}-{law}", marks=marks)


@pytest.mark.parametrize(("law", "example"), list(cases()))
def test_law(law, example):
    LAWS[law][0](example)
