"use strict";

MFN.pages.features = () => MFN.html`<${MFN.Heading} title="Features" />`;
