"""Many devices: degrees, the meshes made of them, and what is spread over these. No globals."""
