import time

from optimum_clp.progress import progress_bar


def drawn(capsys, seconds, **options):
    with progress_bar(2, "Working", **options) as bar:
        bar.update(1)
        time.sleep(seconds)
        bar.update(1)
    return capsys.readouterr()


def test_work_of_more_than_two_seconds_shows_a_bar_on_standard_error(capsys):
    seen = drawn(capsys, 2.1)
    assert "Working" in seen.err and seen.out == ""


def test_short_work_and_quiet_work_show_nothing(capsys):
    assert drawn(capsys, 0.0).err.strip() == ""
    assert drawn(capsys, 2.1, quiet=True).err == ""
