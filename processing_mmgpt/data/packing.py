"""Packing: several conversations in one row."""


def fill_rows(lengths: list[int], width: int) -> list[list[int]]:
    """Put documents into few rows of at most `width` tokens: the longest first, each where it leaves least room.

    Best-fit decreasing: https://en.wikipedia.org/wiki/Best-fit_bin_packing.

    Args:
        lengths: Tokens of each document, at most `width`.
        width: Tokens of a row.

    Returns:
        The numbers of the documents of each row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[number]]
        if fitting:
            row = min(fitting, key=room.__getitem__)
            rows[row].append(number)
            room[row] -= lengths[number]
        else:
            rows.append([number])
            room.append(width - lengths[number])
    return rows
