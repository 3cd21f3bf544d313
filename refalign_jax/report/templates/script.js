// Videos play by themselves, silently. One button pauses and plays all of them; who asked their system for less motion
// finds them paused.
for (const button of document.querySelectorAll("button.play")) {
  const videos = document.querySelectorAll("video");
  const set = (play) => {
    button.setAttribute("aria-pressed", play);
    button.textContent = play ? "Pause all videos" : "Play all videos";
    for (const video of videos) play ? video.play().catch(() => {}) : video.pause();
  };
  button.addEventListener("click", () => set(button.getAttribute("aria-pressed") !== "true"));
  set(!matchMedia("(prefers-reduced-motion: reduce)").matches);
}
