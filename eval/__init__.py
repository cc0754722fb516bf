from rb_noisy.interruption import leave_quietly

leave_quietly()
