import base64
import inspect
import json
import re

import mujoco
import numpy as np
import pytest

from envs import viewer
from envs.viewer import Shape

UNTURNED = (1.0, 0.0, 0.0, 0.0)
RNG = np.random.default_rng(0)
POSITIONS = RNG.normal(size=(2, 3, 4, 3)).astype(np.float32)
ROTATIONS = RNG.normal(size=(2, 3, 4, 4)).astype(np.float32)
GROUND = Shape("plane", (), (0.1, 0.2, 0.3), -1, (0.0, 0.0, -0.5), UNTURNED)
BALL = Shape("sphere", (0.5,), (1.0, 0.5, 0.0), 3, (1.0, 2.0, 3.0), UNTURNED)

# the type checker of conftest.py would speak before the function does
save = inspect.unwrap(viewer.save)


@pytest.fixture
def scene_of(tmp_path):
    """The scene in the page that `save` writes."""

    def write(*arguments, **options):
        save(tmp_path / "page.html", *arguments, **options)
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        return json.loads(re.search(r'<script id="scene" type="application/json">(.*?)</script>', page)[1])

    return write


def array(text, *shape):
    return np.frombuffer(base64.b64decode(text), "<f4").reshape(shape)


def test_page_holds_the_trajectories(scene_of):
    scene = scene_of([GROUND, BALL], POSITIONS, ROTATIONS, seconds_per_frame=0.02, title="ant")
    np.testing.assert_array_equal(array(scene["positions"], 2, 3, 4, 3), POSITIONS)
    np.testing.assert_array_equal(array(scene["rotations"], 2, 3, 4, 4), ROTATIONS)
    assert (scene["episodes"], scene["frames"], scene["links"]) == (2, 3, 4)
    assert (scene["title"], scene["secondsPerFrame"]) == ("ant", 0.02)
    assert scene["markers"] == "" and scene["markerRadius"] is None


def test_episodes_are_told_apart_by_labels(scene_of):
    labels = ["mean actions", "sampled actions"]
    assert scene_of([BALL], POSITIONS, ROTATIONS, labels=labels)["labels"] == labels
    assert scene_of([BALL], POSITIONS, ROTATIONS)["labels"] == []


def test_markers_may_move(scene_of):
    moving, still = POSITIONS[:, :, 0], POSITIONS[:, 0, 0]
    scene = scene_of([BALL], POSITIONS, ROTATIONS, moving, marker_radius=0.03)
    np.testing.assert_array_equal(array(scene["markers"], 2, 3, 3), moving)
    assert scene["markerRadius"] == 0.03
    scene = scene_of([BALL], POSITIONS, ROTATIONS, still)
    np.testing.assert_array_equal(array(scene["markers"], 2, 3, 3), np.repeat(still[:, None], 3, axis=1))


def test_shapes_become_boxes_grown_by_a_radius_and_cylinders(scene_of):
    def solid(kind, size, colour=(0.1, 0.2, 0.3)):
        return scene_of([Shape(kind, size, colour, 1, (1, 2, 3), UNTURNED)], POSITIONS, ROTATIONS)["shapes"][0]

    rest = {"colour": [0.1, 0.2, 0.3, 1], "link": 1, "position": [1, 2, 3], "rotation": [1, 0, 0, 0]}
    assert solid("sphere", (0.5,)) == {"isCylinder": False, "radius": 0.5, "halfSize": [0, 0, 0], **rest}
    assert solid("capsule", (0.5, 2)) == {"isCylinder": False, "radius": 0.5, "halfSize": [0, 0, 2], **rest}
    assert solid("box", (1, 2, 3)) == {"isCylinder": False, "radius": 0, "halfSize": [1, 2, 3], **rest}
    assert solid("cylinder", (0.5, 2)) == {"isCylinder": True, "radius": 0, "halfSize": [0.5, 0.5, 2], **rest}
    assert solid("sphere", (0.5,), (0.1, 0.2, 0.3, 0.4))["colour"] == [0.1, 0.2, 0.3, 0.4]


def test_ground_is_where_the_plane_is(scene_of):
    scene = scene_of([BALL, GROUND], POSITIONS, ROTATIONS)
    assert scene["ground"]["position"] == [0, 0, -0.5] and len(scene["shapes"]) == 1
    assert scene_of([BALL], POSITIONS, ROTATIONS)["ground"] is None


BROKEN = POSITIONS.copy()
BROKEN[1, 2, 3, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": POSITIONS[0]}, r"positions have shape \(3, 4, 3\); expected \(episodes, time, links, 3\)"),
        ({"positions": POSITIONS[:, :0]}, r"positions have shape \(2, 0, 4, 3\); expected"),
        ({"positions": BROKEN}, "positions are not all finite"),
        ({"rotations": ROTATIONS[:1]}, r"rotations have shape \(1, 3, 4, 4\); expected \(2, 3, 4, 4\)"),
        ({"markers": POSITIONS[:, :, 0, :2]}, r"markers have shape \(2, 3, 2\); expected \(2, 3, 3\)"),
        ({"markers": POSITIONS[:1, 0, 0]}, r"markers have shape \(1, 3\); expected \(2, 3\)"),
        ({"markers": BROKEN[:, :, 3]}, "markers are not all finite"),
        ({"marker_radius": 0}, "marker_radius is 0; expected a positive number"),
        ({"seconds_per_frame": float("nan")}, "seconds_per_frame is nan; expected a positive number"),
        ({"shapes": [BALL._replace(kind="mesh")]}, "unknown kind of shape 'mesh'; use sphere, capsule, cylinder, box"),
        ({"shapes": [BALL._replace(link=4)]}, "sphere on link 4; there are 4 links"),
        ({"shapes": [BALL._replace(kind="cylinder")]}, r"cylinder with size \(0.5,\); expected 2 numbers"),
        ({"shapes": [BALL._replace(colour=(1, 0))]}, r"sphere with colour \(1, 0\); expected 3 or 4 numbers"),
        ({"shapes": [BALL._replace(size=(np.inf,))]}, r"sphere with size \(inf,\); expected finite numbers"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(scene_of, change, message):
    arguments = {"shapes": [GROUND, BALL], "positions": POSITIONS, "rotations": ROTATIONS} | change
    with pytest.raises(ValueError, match=message) as error:
        scene_of(**arguments)
    assert "\n" not in str(error.value)


def test_a_title_cannot_close_the_script(scene_of):
    title = "</script><b>ant"
    assert scene_of([BALL], POSITIONS, ROTATIONS, title=title)["title"] == title


def test_page_fetches_nothing(tmp_path):
    viewer.save(tmp_path / "page.html", [GROUND, BALL], POSITIONS, ROTATIONS, POSITIONS[:, :, 0])
    assert not re.search(r"https?:|src=|href=|import\b|@import|url\(|fetch\(", (tmp_path / "page.html").read_text())


MODEL = """
<mujoco>
  <asset><mesh name="wedge" vertex="0 0 0  1 0 0  0 1 0  0 0 1"/></asset>
  <worldbody>
    <geom type="plane" size="1 1 1" pos="0 0 -0.25"/>
    <body>
      <geom type="sphere" size="0.1"/>
      <geom type="capsule" size="0.1 0.2" pos="1 2 3"/>
      <geom type="ellipsoid" size="0.1 0.2 0.3"/>
      <geom type="mesh" mesh="wedge"/>
      <body>
        <joint type="ball"/>
        <geom type="cylinder" size="0.1 0.2" quat="0 1 0 0"/>
        <geom type="box" size="0.1 0.2 0.3" rgba="1 1 1 0.5"/>
        <geom type="box" size="0.1 0.2 0.3" rgba="1 1 1 0"/>
      </body>
    </body>
  </worldbody>
</mujoco>"""


def test_shapes_of_a_model(scene_of):
    model = mujoco.MjModel.from_xml_string(MODEL)
    shapes = viewer.shapes_of(model)
    at_origin = ((0.0, 0.0, 0.0), UNTURNED)
    assert shapes == [
        Shape("plane", (), (*viewer.SCENE, 1.0), -1, (0.0, 0.0, -0.25), UNTURNED),
        Shape("sphere", (0.1,), (*viewer.ROBOT, 1.0), 0, *at_origin),
        Shape("capsule", (0.1, 0.2), (*viewer.ROBOT, 1.0), 0, (1.0, 2.0, 3.0), UNTURNED),
        Shape("cylinder", (0.1, 0.2), (*viewer.ROBOT, 1.0), 1, (0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0)),
        Shape("box", (0.1, 0.2, 0.3), (*viewer.ROBOT, 0.5), 1, *at_origin),
    ]
    scene_of(shapes, POSITIONS, ROTATIONS)
