"""Process groups, parameter tags and the mpu that DeepSpeed sees."""
