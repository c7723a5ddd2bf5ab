"""Actors: stateless processes that play episodes and send their trajectories to the learner."""
