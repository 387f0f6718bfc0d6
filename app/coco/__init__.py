"""The dataset's annotations and images, and COCO's measure. No torch here."""
