"""Small pictures of the tasks for the page of environments: envs/pictures/<name>.png.

python experiments/task_pictures.py             one of each family
python experiments/task_pictures.py NAME...     these
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # read when mujoco is imported

import jax
import mujoco
import numpy as np
from PIL import Image

import envs
from envs import mazes, point, viewer
from envs.robot import Robot

HERE = Path(__file__).parent.parent / "envs" / "pictures"
FAMILIES = """
    point_u_maze ant ant_u_maze ant_u4_maze ant_u5_maze ant_big_maze ant_hardest_maze ant_ball ant_ball_u_maze ant_push
    humanoid humanoid_u_maze humanoid_big_maze simple_u_maze arm_reach arm_push_easy arm_push_hard arm_binpick_easy
    arm_binpick_hard arm_binpick_easy_EEF arm_grasp reacher pusher_easy pusher_hard pusher2 half_cheetah
"""
WIDTH, HEIGHT = 320, 240
SAMPLES = 2
"""Drawn this many times larger, along each axis, and averaged."""
FIELD_OF_VIEW = 35
"""Vertical, in degrees."""
GOAL = (0.9, 0.08, 0.08)

SCENE = """
<mujoco>
  <statistic center="{centre}" extent="{extent}"/>
  <visual>
    <global fovy="{field}" offwidth="{width}" offheight="{height}"/>
    <quality shadowsize="4096" offsamples="8"/>
    <headlight ambient="0.35 0.35 0.35" diffuse="0.25 0.25 0.25" specular="0 0 0"/>
    <map znear="0.02" zfar="100" shadowclip="2"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="0.85 0.9 0.95" rgb2="0.6 0.72 0.85"
      width="64" height="64"/>
    <texture name="squares" type="2d" builtin="checker" rgb1="0.82 0.84 0.87" rgb2="0.74 0.77 0.81"
      width="256" height="256"/>
    <material name="ground" texture="squares" texuniform="true" texrepeat="{repeat} {repeat}" specular="0"/>
    <material name="solid" specular="0.2" shininess="0.4"/>
  </asset>
  <worldbody>
    <light directional="true" dir="-0.36 0.48 -0.8" pos="{light}" diffuse="0.6 0.6 0.6" specular="0.3 0.3 0.3"/>
    {geoms}
  </worldbody>
</mujoco>"""


def main(names: list[str]) -> None:
    HERE.mkdir(exist_ok=True)
    for name in names or FAMILIES.split():
        env = envs.make_kind(name, envs.GoalEnv)
        state = jax.jit(env.reset)(jax.random.key(0))
        image = robot_picture(env, state) if isinstance(env, Robot) else point_picture(env, state)
        image = image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        path = HERE / f"{name}.png"
        # this method keeps the colours of small things: a robot in a large maze
        image.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{path.relative_to(HERE.parent.parent)}: {path.stat().st_size / 1000:.0f} kB")


def point_picture(env, state) -> Image.Image:
    """The maze from above, the robot orange and the goal red."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH / 80, HEIGHT / 80), dpi=80 * SAMPLES, layout="tight")
    mazes.draw(env.maze, axes)
    axes.axis("off")
    axes.add_patch(pyplot.Circle(state.goal, env.success_radius, color=GOAL))
    axes.add_patch(pyplot.Circle(state.observation, point.ROBOT_RADIUS, color=viewer.ROBOT))
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba()).copy())
    pyplot.close(figure)
    return image


def robot_picture(env, state, view=()) -> Image.Image:
    """The scene in 3-D, the goal a red ball; a maze from above, with its first row at the top. Points `view`
    (n, 3), if there are any, are what the camera has in view."""
    positions, rotations = (np.asarray(array, float) for array in env.poses(state))
    shapes = [world_shape(shape, positions, rotations) for shape in env.shapes]
    flat = env.maze or env.name in ("ant_push", "reacher")
    if flat:  # walls overlap, and MuJoCo would light faces in one plane twice
        shapes = [shrunk(shape, 0.001 * i) if shape.kind == "box" else shape for i, shape in enumerate(shapes)]
    points = np.concatenate([corners(shape) for shape in shapes if shape.kind != "plane"])
    points = np.asarray(view) if len(view) else points
    centre, reach = middle(points)
    goal = env.goal_position(state).astype(float)
    if np.linalg.norm(goal - centre) < 2.5 * reach:  # a far one would make the robot too small
        radius = env.marker_radius or max(env.success_radius, 0.03 * reach)
        shapes.append(viewer.Shape("sphere", (radius,), (*GOAL, 0.7), -1, tuple(goal), (1.0, 0.0, 0.0, 0.0)))
        points = points if len(view) else np.concatenate([points, corners(shapes[-1])])
        centre, reach = middle(points)

    camera = mujoco.MjvCamera()
    camera.azimuth, camera.elevation = (172, -60) if flat else (145, -25)
    camera.lookat, camera.distance = framed(points, camera.azimuth, camera.elevation)
    model = mujoco.MjModel.from_xml_string(
        SCENE.format(
            centre=numbers(centre),
            extent=reach,
            light=numbers(centre + 4 * reach * np.array([0.36, -0.48, 0.8])),
            field=FIELD_OF_VIEW,
            width=SAMPLES * WIDTH,
            height=SAMPLES * HEIGHT,
            repeat=0.5 if reach > 1.5 else 5,
            geoms="\n".join(map(geom, shapes)),
        )
    )
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, SAMPLES * HEIGHT, SAMPLES * WIDTH) as renderer:
        renderer.update_scene(data, camera)
        return Image.fromarray(renderer.render())


def world_shape(shape: viewer.Shape, positions: np.ndarray, rotations: np.ndarray) -> viewer.Shape:
    """The same shape, fixed to the world where its link is."""
    if shape.link < 0:
        return shape
    position, rotation = np.zeros(3), np.zeros(4)
    mujoco.mju_rotVecQuat(position, np.array(shape.position), rotations[shape.link])
    mujoco.mju_mulQuat(rotation, rotations[shape.link], np.array(shape.rotation))
    return shape._replace(link=-1, position=tuple(positions[shape.link] + position), rotation=tuple(rotation))


def shrunk(box: viewer.Shape, length: float) -> viewer.Shape:
    return box._replace(size=tuple(half - length for half in box.size))


def corners(shape: viewer.Shape) -> np.ndarray:
    """The 8 corners of the box around a shape."""
    if shape.kind == "box":
        half = np.array(shape.size)
    else:
        radius, half_length = (*shape.size, 0.0)[:2]
        half = np.array([radius, radius, half_length + radius * (shape.kind != "cylinder")])
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, np.array(shape.rotation))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, 8).T
    return np.array(shape.position) + signs * half @ matrix.reshape(3, 3).T


def middle(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The centre and the half diagonal of the box around points."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (low + high) / 2, float(np.linalg.norm(high - low) / 2)


def framed(points: np.ndarray, azimuth: float, elevation: float) -> tuple[np.ndarray, float]:
    """Where a camera looks, and from which distance, so that the points fill the picture but for a margin."""
    turn, rise = np.radians([azimuth, elevation])
    forward = np.array([np.cos(rise) * np.cos(turn), np.cos(rise) * np.sin(turn), np.sin(rise)])
    right = np.array([np.sin(turn), -np.cos(turn), 0])
    up = np.cross(right, forward)
    tangents = np.tan(np.radians(FIELD_OF_VIEW / 2)) / 1.1 * np.array([WIDTH / HEIGHT, 1])
    target, reach = middle(points)
    distance = 4 * reach
    for _ in range(20):  # perspective makes near points larger: centre, measure, and again
        across, depth = (points - target) @ np.stack([right, up], axis=1), (points - target) @ forward
        seen = across / (distance + depth)[:, None]
        target = target + distance * (seen.min(axis=0) + seen.max(axis=0)) / 2 @ np.stack([right, up])
        across = (points - target) @ np.stack([right, up], axis=1)
        distance = float((np.abs(across) / tangents - depth[:, None]).max())
    return target, distance


def geom(shape: viewer.Shape) -> str:
    """MJCF of a shape that is fixed to the world."""
    size = "0 0 1" if shape.kind == "plane" else numbers(shape.size)  # a plane of no size has no end
    material = "ground" if shape.kind == "plane" else "solid"
    colour = (1, 1, 1, 1) if shape.kind == "plane" else (*shape.colour, 1)[:4]
    return (
        f'<geom type="{shape.kind}" size="{size}" material="{material}" rgba="{numbers(colour)}"'
        f' pos="{numbers(shape.position)}" quat="{numbers(shape.rotation)}"/>'
    )


def numbers(values) -> str:
    return " ".join(f"{value:.6g}" for value in values)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
