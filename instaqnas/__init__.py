"""InstaQNAS: input-adaptive mixed-precision object detection."""
