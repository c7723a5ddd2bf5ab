"""What runs inside a box, mounted there at /worker. These files import no package of ours."""
