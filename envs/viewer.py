"""Turns robot trajectories into one HTML file that plays them in any browser, offline.

The page is `viewer.html` beside this file, with the scene pasted in as JSON and the trajectories as base64 float32:
about 37 bytes for each link of each frame. A link is a moving frame of the robot; shapes are fixed to links.

In brax, link i is MuJoCo's body i + 1, so a geom's shape has `link=geom_bodyid - 1`; walls then get -1, the world.
"""

import base64
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SIZE_LENGTHS = {"sphere": 1, "capsule": 2, "box": 3, "plane": None}
"""The kinds of shapes, and how many sizes each takes (None: ignored)."""


class Shape(NamedTuple):
    """One solid of the scene. Lengths are in metres, quaternions are w, x, y, z."""

    kind: str
    """'sphere', 'capsule', 'box', or 'plane': the ground at z = 0, wherever it is put, with squares of 1 m."""
    size: tuple[float, ...]
    """As in MuJoCo: sphere (radius,), capsule (radius, half length along z), box half sizes (x, y, z), plane ()."""
    colour: tuple[float, float, float]
    """Red, green, blue from 0 to 1."""
    link: int
    """The link it is fixed to, -1 for the world."""
    position: tuple[float, float, float]
    """Its centre in the link's frame."""
    rotation: tuple[float, float, float, float]
    """Its orientation in the link's frame, a unit quaternion."""


def save(
    path: str | Path,
    shapes: list[Shape],
    positions: Float[np.ndarray, "episodes time links 3"],
    rotations: Float[np.ndarray, "episodes time links 4"],
    markers: Float[np.ndarray, "episodes 3"] | None = None,
    seconds_per_frame: float = 0.05,
    title: str = "",
) -> None:
    """Writes the viewer to `path`.

    Args:
      path: the HTML file, overwritten if it exists.
      shapes: robot, walls and ground.
      positions: of the links in the world, in metres. Link 0 is the one that 'follow robot' follows.
      rotations: of the links in the world, unit quaternions w, x, y, z.
      markers: each episode's goal in the world, in metres, drawn as a red ball under a red pole.
      seconds_per_frame: simulated time from one frame to the next.
      title: shown beside the controls and as the page's title.

    ValueError in one line if the arrays or a shape do not fit together.
    """
    positions = np.asarray(positions, "<f4")
    if positions.ndim != 4 or positions.shape[-1] != 3 or 0 in positions.shape:
        raise ValueError(f"positions have shape {positions.shape}; expected (episodes, time, links, 3), none of them 0")
    episodes, frames, links, _ = positions.shape
    _check_array("positions", positions, positions.shape)
    rotations = np.asarray(rotations, "<f4")
    _check_array("rotations", rotations, (episodes, frames, links, 4))
    if markers is not None:
        markers = np.asarray(markers, "<f4")
        _check_array("markers", markers, (episodes, 3))
    if not seconds_per_frame > 0:
        raise ValueError(f"seconds_per_frame is {seconds_per_frame}; expected a positive number")
    for shape in shapes:
        _check_shape(shape, links)

    scene = {
        "title": title,
        "secondsPerFrame": float(seconds_per_frame),
        "episodes": episodes,
        "frames": frames,
        "links": links,
        "ground": next((_floats(shape.colour) for shape in shapes if shape.kind == "plane"), None),
        "shapes": [_rounded_box(shape) for shape in shapes if shape.kind != "plane"],
        "markers": [] if markers is None else markers.tolist(),
        "positions": base64.b64encode(positions.tobytes()).decode(),
        "rotations": base64.b64encode(rotations.tobytes()).decode(),
    }
    # no '<', so that a title cannot close the script element that holds the JSON
    text = json.dumps(scene, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace("__SCENE__", text), encoding="utf-8")


def _rounded_box(shape: Shape) -> dict:
    """The page knows one solid only, a box grown by a radius; spheres and capsules are boxes of no width."""
    size = _floats(shape.size)
    half_length = size[1] if shape.kind == "capsule" else 0
    radius, half_size = (0, size) if shape.kind == "box" else (size[0], [0, 0, half_length])
    return {
        "radius": radius,
        "halfSize": half_size,
        "colour": _floats(shape.colour),
        "link": int(shape.link),
        "position": _floats(shape.position),
        "rotation": _floats(shape.rotation),
    }


def _check_array(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} have shape {array.shape}; expected {expected}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} are not all finite; cut the trajectory before it diverges")


def _check_shape(shape: Shape, links: int) -> None:
    if shape.kind not in SIZE_LENGTHS:
        raise ValueError(f"unknown kind of shape {shape.kind!r}; use {', '.join(SIZE_LENGTHS)}")
    if not -1 <= shape.link < links:
        raise ValueError(f"{shape.kind} on link {shape.link}; there are {links} links, and -1 is the world")
    lengths = {"size": SIZE_LENGTHS[shape.kind], "colour": 3, "position": 3, "rotation": 4}
    for field, length in lengths.items():
        if length is not None and len(getattr(shape, field)) != length:
            raise ValueError(f"{shape.kind} with {field} {getattr(shape, field)}; expected {length} numbers")


def _floats(numbers) -> list[float]:
    return [float(number) for number in numbers]


ROBOT, SCENE = (0.95, 0.55, 0.15), (0.55, 0.6, 0.68)
"""Colours: models bring dull ones, and a robot is small in a maze."""


def shapes_of(model) -> list[Shape]:
    """The shapes of a `mujoco.MjModel` whose body i + 1 is link i; geoms of other kinds are left out."""
    kinds = {0: "plane", 2: "sphere", 3: "capsule", 6: "box"}  # mujoco.mjtGeom
    shapes = []
    for kind, size, body, position, rotation in zip(
        model.geom_type, model.geom_size, model.geom_bodyid, model.geom_pos, model.geom_quat
    ):
        if kind in kinds:
            name = kinds[kind]
            colour = ROBOT if body else SCENE
            size = tuple(map(float, size[: SIZE_LENGTHS[name] or 0]))
            shapes.append(
                Shape(name, size, colour, int(body) - 1, tuple(map(float, position)), tuple(map(float, rotation)))
            )
    return shapes
