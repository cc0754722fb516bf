"""`python -m rb_noisy`, the same as the console command `rb-noisy`."""

from rb_noisy.cli import app

app(prog_name="rb-noisy")
