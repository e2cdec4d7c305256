"""What corresponds in two builds: functions, references, addresses."""
