// Escape stops an answer; the talk follows its end; a token shows its label while pointed at.
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
});

const follow = () => {
  const talk = document.querySelector("#talk");
  if (!talk) return setTimeout(follow, 50);
  let isAtEnd = true;
  talk.addEventListener("scroll", () => {
    isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 40;
  });
  const scroll = () => { if (isAtEnd) talk.scrollTop = talk.scrollHeight; };
  new MutationObserver(scroll).observe(talk, { childList: true, subtree: true });
};
follow();

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.addEventListener("mouseover", (event) => {
  if (!tip.isConnected) document.body.append(tip);
  const token = event.target.closest?.("[data-label]");
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = token.dataset.label;
  const box = token.getClientRects()[0];
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.min(box.bottom + 4, innerHeight - tip.offsetHeight - 4)}px`;
});
