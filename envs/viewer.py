"""Turns robot trajectories into one HTML file that plays them in any browser, offline.

The page is `viewer.html` beside this file, with the scene pasted in as JSON and the trajectories as base64 float32:
about 37 bytes for each link of each frame. A link is a moving frame of the robot; shapes are fixed to links.

In brax, link i is MuJoCo's body i + 1, so a geom's shape has `link=geom_bodyid - 1`; walls then get -1, the world.
"""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SIZE_LENGTHS = {"sphere": 1, "capsule": 2, "cylinder": 2, "box": 3, "plane": None}
"""The kinds of shapes, and how many sizes each takes (None: ignored)."""


class Shape(NamedTuple):
    """One solid of the scene. Lengths are in metres, quaternions are w, x, y, z."""

    kind: str
    """'sphere', 'capsule', 'cylinder', 'box', or 'plane': the ground, level and without end at its position's z, with
    squares of 1 m (of 10 cm in a scene as small as a table); only the first is drawn."""
    size: tuple[float, ...]
    """As in MuJoCo: sphere (radius,), capsule and cylinder (radius, half length along z), box half sizes (x, y, z),
    plane ()."""
    colour: tuple[float, float, float] | tuple[float, float, float, float]
    """Red, green, blue from 0 to 1, and perhaps alpha: below 1 the shape is translucent, and casts no shadow."""
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
    markers: Float[np.ndarray, "episodes 3"] | Float[np.ndarray, "episodes time 3"] | None = None,
    seconds_per_frame: float = 0.05,
    title: str = "",
    marker_radius: float | None = None,
    labels: Sequence[str] = (),
) -> None:
    """Writes the viewer to `path`.

    Args:
      path: the HTML file, overwritten if it exists.
      shapes: robot, walls and ground.
      positions: of the links in the world, in metres. Link 0 is the one that 'follow robot' follows.
      rotations: of the links in the world, unit quaternions w, x, y, z.
      markers: each episode's goal in the world, or each frame's, in metres, drawn as a red ball under a red pole.
      seconds_per_frame: simulated time from one frame to the next.
      title: shown beside the controls and as the page's title.
      marker_radius: of the red ball, in metres; None takes 0.3 times the reach of the robot.
      labels: what each episode is, beside its number.

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
        _check_array("markers", markers, (episodes, 3) if markers.ndim == 2 else (episodes, frames, 3))
        markers = np.broadcast_to(markers.reshape(episodes, -1, 3), (episodes, frames, 3))
    for name, number in {"seconds_per_frame": seconds_per_frame, "marker_radius": marker_radius}.items():
        if number is not None and not 0 < number < np.inf:
            raise ValueError(f"{name} is {number}; expected a positive number")
    for shape in shapes:
        _check_shape(shape, links)

    scene = {
        "title": title,
        "labels": [*labels],
        "secondsPerFrame": float(seconds_per_frame),
        "episodes": episodes,
        "frames": frames,
        "links": links,
        "ground": next((_solid(shape) for shape in shapes if shape.kind == "plane"), None),
        "shapes": [_solid(shape) for shape in shapes if shape.kind != "plane"],
        "markerRadius": None if marker_radius is None else float(marker_radius),
        "markers": "" if markers is None else _base64(markers),
        "positions": _base64(positions),
        "rotations": _base64(rotations),
    }
    # no '<', so that a title cannot close the script element that holds the JSON
    text = json.dumps(scene, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    Path(path).write_text(page.replace("__SCENE__", text), encoding="utf-8")


def _solid(shape: Shape) -> dict:
    """The page knows two solids, a box grown by a radius and a cylinder; spheres and capsules are boxes of no width."""
    radius, half_size = 0, _floats(shape.size)
    if shape.kind in ("sphere", "capsule"):
        radius, half_size = half_size[0], [0, 0, sum(half_size[1:])]
    elif shape.kind == "cylinder":
        half_size = [half_size[0], *half_size]
    return {
        "isCylinder": shape.kind == "cylinder",
        "radius": radius,
        "halfSize": half_size,
        "colour": [*_floats(shape.colour), 1][:4],
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
    lengths = {"size": {SIZE_LENGTHS[shape.kind]}, "colour": {3, 4}, "position": {3}, "rotation": {4}}
    for field, allowed in lengths.items():
        numbers = getattr(shape, field)
        if None not in allowed and len(numbers) not in allowed:
            expected = " or ".join(map(str, sorted(allowed)))
            raise ValueError(f"{shape.kind} with {field} {numbers}; expected {expected} numbers")
        if not np.isfinite(numbers).all():
            raise ValueError(f"{shape.kind} with {field} {numbers}; expected finite numbers")


def _floats(numbers) -> list[float]:
    return [float(number) for number in numbers]


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


ROBOT, SCENE = (0.95, 0.55, 0.15), (0.55, 0.6, 0.68)
"""Colours: models bring dull ones, and a robot is small in a maze."""


def shapes_of(model) -> list[Shape]:
    """The shapes of a `mujoco.MjModel` whose body i + 1 is link i; invisible geoms and other kinds are left out."""
    kinds = {0: "plane", 2: "sphere", 3: "capsule", 5: "cylinder", 6: "box"}  # mujoco.mjtGeom
    shapes = []
    for kind, size, body, position, rotation, (*_, alpha) in zip(
        model.geom_type, model.geom_size, model.geom_bodyid, model.geom_pos, model.geom_quat, model.geom_rgba
    ):
        if kind in kinds and alpha > 0:
            name = kinds[kind]
            colour = (*(ROBOT if body else SCENE), float(alpha))
            size = tuple(map(float, size[: SIZE_LENGTHS[name] or 0]))
            shapes.append(
                Shape(name, size, colour, int(body) - 1, tuple(map(float, position)), tuple(map(float, rotation)))
            )
    return shapes
