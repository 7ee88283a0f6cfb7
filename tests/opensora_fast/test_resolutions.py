"""The size table of Open-Sora 2.0, entry by entry, and what holds for every size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.resolutions import ASPECT_RATIOS, area, sizes, video_size

# ratio: 256px inference, 256px training, 768px inference, 768px training (all multiples of 16), 768px inference of 32.
# None: left out of the training table because another ratio has this size.
RELEASED = {
    "2.39:1": [(160, 384), (160, 400), (496, 1184), (496, 1184), (480, 1184)],
    "2:1": [(176, 352), (176, 368), (544, 1072), (544, 1088), (544, 1056)],
    "16:9": [(192, 336), (192, 336), (576, 1024), (576, 1024), (576, 1024)],
    "1.85:1": [(192, 336), None, (560, 1040), (560, 1056), (576, 1024)],
    "9:16": [(336, 192), (336, 192), (1024, 576), (1024, 576), (1024, 576)],
    "5:8": [(336, 192), None, (992, 592), (992, 592), (1024, 576)],
    "3:2": [(208, 304), (208, 320), (624, 928), (624, 944), (608, 928)],
    "4:3": [(224, 288), (224, 288), (656, 880), (672, 880), (672, 864)],
    "1:1": [(256, 256), (256, 256), (768, 768), (768, 768), (768, 768)],
}
COLUMNS = [("256px", 16, False), ("256px", 16, True), ("768px", 16, False), ("768px", 16, True), ("768px", 32, False)]


@pytest.mark.parametrize("column", range(len(COLUMNS)), ids=str)
def test_every_entry_of_the_released_table(column):
    resolution, multiple, training = COLUMNS[column]
    expected = {ratio: row[column] for ratio, row in RELEASED.items() if row[column]}
    expected |= {":".join(reversed(ratio.split(":"))): (width, height) for ratio, (height, width) in expected.items()}
    assert sizes(resolution, multiple, training=training) == expected


@given(
    resolution=st.sampled_from(["64px", "96px", "256px", "480p", "768px", "1024px"]),
    ratio=st.sampled_from(ASPECT_RATIOS),
    multiple=st.sampled_from([8, 16, 32]),
    training=st.booleans(),
)
def test_sizes_are_multiples_near_the_area_and_transpose(resolution, ratio, multiple, training):
    height, width = video_size(resolution, ratio, multiple, training=training)
    assert height % multiple == 0
    assert width % multiple == 0
    transposed = ":".join(reversed(ratio.split(":")))
    assert video_size(resolution, transposed, multiple, training=training) == (width, height)
    if not training:
        assert area(resolution) - multiple * (height + width) < height * width <= area(resolution)


def test_areas():
    assert area("256px") == 65536
    assert area("720p") == 720 * 1280
    assert area("256px_ar1:1") == 65536


def test_a_suffix_narrows_the_table_to_one_ratio():
    assert sizes("256px_ar9:16", 16, training=True) == {"9:16": (336, 192)}
    assert sizes("256px_max", 16, training=True) == {"3:2": (208, 320)}


def test_a_ratio_left_out_of_the_training_table_has_the_size_of_its_double():
    assert "1.85:1" not in sizes("256px", 16, training=True)
    assert video_size("256px", "1.85:1", 16, training=True) == (192, 336)


@pytest.mark.parametrize("resolution", ["256", "px", "0px", "256px_ar7:5", "256px_min"])
def test_an_unknown_resolution_is_named_with_the_known_forms(resolution):
    with pytest.raises(UserError, match=f"(?s){resolution}.*256px.*16:9"):
        sizes(resolution, 16, training=False)


def test_unknown_ratio_and_too_small_resolution():
    with pytest.raises(UserError, match=r"'7:5' is not known.*16:9"):
        video_size("256px", "7:5", 16, training=False)
    with pytest.raises(UserError, match=r"'32px' is too small.*choose 64px"):
        sizes("32px", 32, training=True)
    assert sizes("64px", 32, training=True)
