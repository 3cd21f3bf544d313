// Plays and pauses all videos with one button.
for (const button of document.querySelectorAll("button.play")) {
  const videos = document.querySelectorAll("video");
  button.addEventListener("click", () => {
    const play = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", play);
    button.textContent = play ? "Pause all videos" : "Play all videos";
    for (const video of videos) play ? video.play() : video.pause();
  });
}
