for (const chart of document.querySelectorAll("figure.chart")) {
  const svg = chart.querySelector("svg"), guide = svg.querySelector(".guide"), output = chart.querySelector(".values");
  const curves = [...svg.querySelectorAll(".curve")].map((curve) => ({
    name: curve.dataset.name,
    points: curve.dataset.points.split(" ").filter(Boolean).map((pair) => pair.split(",").map(Number)),
  }));
  const [low, high, left, right] = ["low", "high", "left", "right"].map((name) => Number(svg.dataset[name]));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = low + ((place - left) / (right - left)) * (high - low);
    const nearest = curves.filter((curve) => curve.points.length).map((curve) => ({
      name: curve.name,
      point: curve.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)),
    }));
    output.textContent = nearest.map(({ name, point }) => `${name} ${point[1]} (step ${point[0]})`).join("; ");
    const x = left + ((nearest[0].point[0] - low) / (high - low)) * (right - left);
    guide.setAttribute("x1", x);
    guide.setAttribute("x2", x);
    guide.style.visibility = "visible";
  });
  svg.addEventListener("pointerleave", () => {
    output.textContent = "";
    guide.style.visibility = "hidden";
  });
}
