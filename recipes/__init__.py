"""What people run: one short program a job."""
