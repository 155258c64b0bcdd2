"""Orders in which scans visit a grid, and windows of it.

Orders are arithmetic on token positions: nothing is stored, and any grid will do. H and W are the sides of a grid, L =
H W its tokens, T the steps of a scan with its padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reduction import take_rows
from .grid import Sides


class Order(NamedTuple):
    """A way over a grid of L tokens in T >= L steps; a reversed direction goes the same way from its last step.

    Steps that no token enters at are padding.
    """

    enter: Tensor  # (L,) step at which each token enters
    leave: Tensor  # (L,) step whose output each token takes
    steps: int  # T

    def visits(self) -> Tensor:
        """(T,): the token of each step; L where the step is padding."""
        tokens = torch.arange(len(self.enter), device=self.enter.device)
        return tokens.new_full((self.steps,), len(tokens)).scatter(0, self.enter, tokens)


def row_order(grid: Sides, device: torch.device | None = None) -> Order:
    """Row by row: the order of the tokens themselves."""
    tokens = torch.arange(grid[0] * grid[1], device=device)
    return Order(tokens, tokens, len(tokens))


def column_order(grid: Sides, device: torch.device | None = None) -> Order:
    """Column by column."""
    height, width = grid
    tokens = torch.arange(height * width, device=device)
    step = tokens % width * height + tokens // width
    return Order(step, step, len(tokens))


def local_order(name: str, grid: Sides, device: torch.device | None = None) -> Order:
    """An order of LocalMamba, without its direction: "h" rows, "v" columns, "w2" and "w7" windows of that side.

    Windows come row by row, and so do the places in a window; the grid is padded to whole windows on the right and at
    the bottom. On a grid that is not square the official code puts the columns back as if its sides were swapped, which
    trained weights know: a token of "v" then leaves with the output of another one.
    """
    height, width = grid
    if name == "h":
        return row_order(grid, device)
    if name == "v":
        order = column_order(grid, device)
        tokens = torch.arange(height * width, device=device)
        return Order(order.enter, tokens % height * width + tokens // height, order.steps)
    side = int(name[1:])
    down, across = -(-height // side), -(-width // side)
    tokens = torch.arange(height * width, device=device)
    row, column = tokens // width, tokens % width
    window = row // side * across + column // side
    step = (window * side + row % side) * side + column % side
    return Order(step, step, down * across * side * side)


def directions(layers: str) -> tuple[tuple[str, ...], ...]:
    """Names of scan orders in lines: "h h_flip, v w2" -> (("h", "h_flip"), ("v", "w2"))."""
    return tuple(tuple(layer.split()) for layer in layers.split(","))


def to_windows(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B n, side^2, C): windows row by row, zeros where one sticks out (right, bottom)."""
    height, width = x.shape[2:]
    x = F.pad(x, (0, -width % side, 0, -height % side))
    down, across = x.shape[2] // side, x.shape[3] // side
    x = x.unflatten(3, (across, side)).unflatten(2, (down, side))  # (B, C, down, side, across, side)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def from_windows(windows: Tensor, side: int, grid: Sides) -> Tensor:
    """(B n, side^2, C) -> (B, C, H, W): the windows put together, their padding cut off."""
    height, width = grid
    down, across = -(-height // side), -(-width // side)
    x = windows.unflatten(0, (-1, down, across)).unflatten(3, (side, side))  # (B, down, across, side, side, C)
    x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return x[:, :, :height, :width]


def snakes(grid: Sides, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The four scans of PlainMamba: row by row and column by column, each turning round at the end, and both backwards.

    Returns:
        (4, L): the token of each step, in the order rows, rows backwards, columns, columns backwards; and (4, L): the
        move that led to it: 0 none, 1 right, 2 left, 3 up, 4 down.
    """
    height, width = grid
    step = torch.arange(height * width, device=device)
    row, column = step // width, step % width
    rows = row * width + torch.where(row % 2 == 0, column, width - 1 - column)
    column, row = step // height, step % height
    columns = torch.where(column % 2 == 0, row, height - 1 - row) * width + column
    last = height * width - 1 - step
    visits = torch.stack([rows, rows[last], columns, columns[last]])
    down, across = visits.div(width, rounding_mode="floor").diff(dim=1), (visits % width).diff(dim=1)
    moves = torch.where(across == 1, 1, torch.where(across == -1, 2, torch.where(down == -1, 3, 4)))
    return visits, F.pad(moves, (1, 0))


class Walk(NamedTuple):
    """How one direction goes over the tokens that are there."""

    visits: Tensor  # (B, T) the token of each step, L where the step is padding
    enter: Tensor  # (B, L) the step at which each token enters
    leave: Tensor  # (B, L) the step whose output it takes
    reverse: bool
    straight: bool  # whether step t is token t

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) -> steps (B, T, C), zeros where a step is padding."""
        if self.straight:
            return x
        padded = self.visits.shape[1] > x.shape[1]
        return take_rows(F.pad(x, (0, 0, 0, 1)) if padded else x, self.visits)

    def entered(self, x: Tensor) -> Tensor:
        """Steps (B, T, ...) -> tokens (B, L, ...): what each token had when it entered."""
        return x if self.straight else take_rows(x, self.enter)

    def left(self, x: Tensor) -> Tensor:
        """Steps (B, T, ...) -> tokens (B, L, ...): what each token leaves with."""
        return x if self.straight else take_rows(x, self.leave)


def walk(name: str, grid: Sides, patch: Tensor, is_class: Tensor | None) -> Walk:
    """An order of LocalMamba, restricted to the tokens that are there.

    Args:
        name: of the order.
        grid: of all patches.
        patch: (B, L) which patch each token is; any for a class token.
        is_class: (B, L) which token is the class token; None where there is none. In every order it stands in the
            middle of as many steps as there are tokens, as in the official code.
    """
    reverse = name.endswith("_flip")
    order = local_order(name.removesuffix("_flip"), grid, patch.device)
    return restricted(order, patch, is_class, reverse, straight=is_class is None and name.startswith("h"))


def restricted(
    order: Order, patch: Tensor, is_class: Tensor | None = None, reverse: bool = False, straight: bool = False
) -> Walk:
    """Any order, restricted to the tokens that are there; padding stays. Arguments as in `walk` and `Walk`."""
    batch, length = patch.shape
    steps = length + order.steps - len(order.enter)
    middle = (length - 1) // 2 if not reverse else steps - 1 - (length - 1) // 2

    def rank(table: Tensor) -> Tensor:
        """(M,) steps of all patches -> (B, L): steps where patches that are gone are left out."""
        at = table[patch]  # (B, L)
        if is_class is not None:
            at = at.masked_fill(is_class, order.steps)  # a place of its own behind the others
        taken = patch.new_ones(order.steps + 1).scatter(0, table, 0).repeat(batch, 1)  # the padding
        among = taken.scatter(1, at, 1).cumsum(1).gather(1, at) - 1
        return among if is_class is None else torch.where(is_class, middle, among + (among >= middle))

    enter = rank(order.enter)
    tokens = torch.arange(length, device=patch.device).expand(batch, -1)
    visits = patch.new_full((batch, steps), length).scatter(1, enter, tokens)
    return Walk(visits, enter, rank(order.leave), reverse, straight)
